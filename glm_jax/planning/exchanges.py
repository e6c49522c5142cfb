"""Exchanges between devices that a compiled program has, those in loops counted as often as
the loop runs, or, where the text does not say that, as often as a model has layers: then the
few bytes of loops that choose a token are counted too often. Branches count as if taken."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

_KINDS = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"
_EXCHANGE = re.compile(rf"= (?P<type>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(\w+?)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
_WHILE = re.compile(r" while\(.*body=%?(?P<body>[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":"(?P<n>\d+)"')
_CALLED = re.compile(r"(?:to_apply|calls|called_computations|branch_computations)=\{?%?([^}\s,]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One in a program's text.

    Attributes:
      kind: all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute.
      bytes: of its result, on a device.
      times: how often it runs.
    """

    kind: str
    bytes: int
    times: int


def exchanges(text: str, loops: int) -> list[Exchange]:
    """All exchanges of a program.

    Args:
      text: the compiled program's.
      loops: how often a loop runs whose text does not say so: a model's layers.
    """
    bodies = dict(_computations(text))
    entry = next(name for name, (is_entry, _) in bodies.items() if is_entry)
    times = {entry: 1}
    # Computations stand before those that call them.
    for name, (_, lines) in reversed(list(bodies.items())):
        if name in times:
            for called, count in _calls(lines, loops):
                times[called] = times.get(called, 0) + times[name] * count
    return [
        Exchange(kind, size, times[name])
        for name, (_, lines) in bodies.items()
        if name in times
        for kind, size in in_lines(lines)
    ]


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    name, is_entry, lines = "", False, list[str]()
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match is not None:
            name, is_entry, lines = match["name"], match["entry"] is not None, []
        elif line.startswith("}") and name:
            yield name, (is_entry, lines)
            name = ""
        else:
            lines.append(line)


def _calls(lines: list[str], loops: int) -> Iterator[tuple[str, int]]:
    for line in lines:
        loop = _WHILE.search(line)
        if loop is not None:
            trips = _TRIPS.search(line)
            yield loop["body"], loops if trips is None else int(trips["n"])
            continue
        branches = _BRANCHES.search(line)
        if branches is not None:
            for name in branches[1].split(","):
                yield name.strip().lstrip("%"), 1
            continue
        for name in _CALLED.findall(line):
            yield name.lstrip("%"), 1


def in_lines(lines: list[str]) -> Iterator[tuple[str, int]]:
    """Kind, and bytes of the result, of each exchange that stands in a text."""
    for line in lines:
        match = _EXCHANGE.search(line)
        if match is None:
            continue
        arrays = [
            _BYTES.get(dtype, 4) * math.prod(map(int, filter(None, sizes.split(","))))
            for dtype, sizes in _ARRAY.findall(match["type"])
        ]
        # An asynchronous one's type has its operands, then its results.
        yield match["kind"], sum(arrays[len(arrays) // 2 :] if match["start"] else arrays)


def by_kind(found: Iterable[Exchange]) -> dict[str, tuple[int, int]]:
    """How many of each kind run, and their bytes together."""
    counted: dict[str, tuple[int, int]] = {}
    for exchange in found:
        count, size = counted.get(exchange.kind, (0, 0))
        more = exchange.times * exchange.bytes
        counted[exchange.kind] = (count + exchange.times, size + more)
    return counted


def link_bytes(found: Iterable[Exchange], devices: int) -> int:
    """Bytes that a device sends where exchanges go round a ring.

    An all-reduce sends its result twice but for one part of `devices`; the others once.
    """
    share = (devices - 1) / devices
    factors = {"all-reduce": 2 * share, "reduce-scatter": devices * share}
    return round(sum(e.times * e.bytes * factors.get(e.kind, share) for e in found))
