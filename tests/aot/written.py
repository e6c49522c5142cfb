"""What a compiled program writes to memory, read from its text."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<type>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\(")
_CALLS = re.compile(r" calls=%?([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
# These name memory that something else wrote.
_NAMES = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
_NAMES |= {"while", "call", "conditional"}


@dataclasses.dataclass(frozen=True)
class Written:
    """The result of an instruction that is a kernel, a library call or a copy.

    Attributes:
      opcode: XLA's.
      parts: opcodes inside, of a fusion.
      shape, dtype: of the result, of several the largest.
      bytes: of that one.
      line: the program's.
    """

    opcode: str
    parts: frozenset[str]
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    line: str


def written(text: str, least: int) -> list[Written]:
    """All results of at least so many bytes, those within loops and branches once each."""
    lines = dict(_computations(text))
    fused = {name for body in lines.values() for line in body for name in _CALLS.findall(line)}
    found = []
    for name, body in lines.items():
        if name in fused:
            continue
        for line in body:
            match = _INSTRUCTION.match(line)
            if match is None or match["opcode"] in _NAMES:
                continue
            size, dtype, shape = max(_arrays(match["type"]), default=(0, "", ()))
            if size >= least:
                inside = {part for called in _CALLS.findall(line) for part in _parts(lines, called)}
                opcode = match["opcode"]
                found.append(Written(opcode, frozenset(inside), shape, dtype, size, line.strip()))
    return found


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, body = "", []
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match is not None:
            name, body = match[1], []
        elif line == "}":
            yield name, body
        else:
            body.append(line)


def _parts(lines: dict[str, list[str]], name: str) -> Iterator[str]:
    for line in lines[name]:
        match = _INSTRUCTION.match(line)
        if match is not None:
            yield match["opcode"]
        for called in _CALLS.findall(line):
            yield from _parts(lines, called)


def _arrays(of_type: str) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    for dtype, sizes in _ARRAY.findall(of_type):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        yield math.prod(shape) * _BITS.get(dtype, 0) // 8, dtype, shape
