"""Exchanges between devices that a compiled program has, those in loops counted as often as
the loop runs, or, where the text does not say that, as often as a model has layers: then the
few bytes of loops that choose a token are counted too often. Branches count as if taken."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

_KINDS = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"
_EXCHANGE = re.compile(rf"= (?P<type>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(\w+?)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
_WHILE = re.compile(r" while\(.*body=%?(?P<body>[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":"(?P<n>\d+)"')
_CALLED = re.compile(r"(?:to_apply|calls|called_computations|branch_computations)=\{?%?([^}\s,]+)")
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]+)\] \{([^}]+)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+))?")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One in a program's text.

    Attributes:
      kind: all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute.
      bytes: of its result, on a device.
      times: how often it runs.
      group: the devices of one group that exchange, in order; empty where all do.
    """

    kind: str
    bytes: int
    times: int
    group: tuple[int, ...] = ()


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
        dataclasses.replace(exchange, times=times[name])
        for name, (_, lines) in bodies.items()
        if name in times
        for exchange in in_lines(lines)
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


def in_lines(lines: list[str]) -> Iterator[Exchange]:
    """Each exchange that stands in a text, once."""
    for line in lines:
        match = _EXCHANGE.search(line)
        if match is None:
            continue
        arrays = [
            _BYTES.get(dtype, 4) * math.prod(map(int, filter(None, sizes.split(","))))
            for dtype, sizes in _ARRAY.findall(match["type"])
        ]
        # An asynchronous one's type has its operands, then its results.
        size = sum(arrays[len(arrays) // 2 :] if match["start"] else arrays)
        yield Exchange(match["kind"], size, 1, _group(line))


def _group(line: str) -> tuple[int, ...]:
    listed = _LISTED_GROUP.search(line)
    if listed is not None:
        return tuple(map(int, listed[1].split(",")))
    named = _NAMED_GROUPS.search(line)
    if named is not None:
        axes = {name: int(size) for name, size in _AXIS.findall(named[1])}
        ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        members = [name for name, _ in _AXIS.findall(named[2])]
        of_group = tuple(slice(None) if name in members else 0 for name in axes)
        return tuple(ids[of_group].ravel().tolist())
    counted = _COUNTED_GROUPS.search(line)
    if counted is None:
        return ()
    numbers = lambda text: [int(part) for part in text.split(",")]
    ids = np.arange(math.prod(numbers(counted[3]))).reshape(numbers(counted[3]))
    ids = ids.transpose(numbers(counted[4])) if counted[4] else ids
    return tuple(ids.reshape(int(counted[1]), int(counted[2]))[0].tolist())


def by_kind(found: Iterable[Exchange]) -> dict[str, tuple[int, int]]:
    """How many of each kind run, and their bytes together."""
    counted: dict[str, tuple[int, int]] = {}
    for exchange in found:
        count, size = counted.get(exchange.kind, (0, 0))
        more = exchange.times * exchange.bytes
        counted[exchange.kind] = (count + exchange.times, size + more)
    return counted


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that a device sends in a step.

    Attributes:
      link: by its links to others of its host.
      network: between hosts.
    """

    link: int
    network: int


def sent(found: Iterable[Exchange], devices: int, a_host: int) -> Sent:
    """What a device sends where exchanges go round a ring, hosts after one another.

    An all-reduce sends its result twice but for its own part; a reduce-scatter's parts are
    each as large as the result; the others send it once. Between hosts the devices of one
    that are in the ring share the way.

    Args:
      a_host: devices of a host, numbered one after another.
    """
    link = network = 0.0
    for exchange in found:
        group = exchange.group or tuple(range(devices))
        share = (len(group) - 1) / len(group)
        factors = {"all-reduce": 2 * share, "reduce-scatter": len(group) * share}
        size = exchange.times * exchange.bytes * factors.get(exchange.kind, share)
        beside = sum(device // a_host == group[0] // a_host for device in group)
        if beside < len(group):
            network += size / beside
        if beside > 1:
            link += size
    return Sent(round(link), round(network))
