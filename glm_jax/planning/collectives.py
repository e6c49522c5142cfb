"""Collectives of a compiled program, read from its text.

Those in a loop count once for each iteration. Where the text does not state the trip count, it is
the constant that the loop's condition compares with, and where that has none a model's number of
layers. Branches count as if taken.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

_KINDS = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"
_COLLECTIVE = re.compile(rf"= (?P<type>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(\w+?)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
_WHILE = re.compile(r" while\(.*condition=%?(?P<condition>[\w.\-]+), body=%?(?P<body>[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":"(?P<n>\d+)"')
_LIMIT = re.compile(r"= [su]32\[\]\S* constant\((?P<n>\d+)\)")
_CALLED = re.compile(r"(?:to_apply|calls|called_computations|branch_computations)=\{?%?([^}\s,]+)")
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]+)\] \{([^}]+)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+))?")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute.
      bytes: of its result, on one device.
      times: number of times it runs.
      group: the devices of one replica group, in order; empty for all devices.
    """

    kind: str
    bytes: int
    times: int
    group: tuple[int, ...] = ()


def find_collectives(text: str, loops: int) -> list[Collective]:
    """Return all collectives of a program.

    Args:
      text: HLO of the compiled program.
      loops: trip count of loops without a constant one: the model's number of layers.
    """
    computations = dict(_computations(text))
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    bodies = {name: lines for name, (_, lines) in computations.items()}
    times = {entry: 1}
    # Computations stand before those that call them.
    for name, lines in reversed(list(bodies.items())):
        if name in times:
            for called, count in _calls(lines, loops, bodies):
                times[called] = times.get(called, 0) + times[name] * count
    return [
        dataclasses.replace(collective, times=times[name])
        for name, lines in bodies.items()
        if name in times
        for collective in parse_collectives(lines)
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


def _calls(
    lines: list[str], loops: int, bodies: Mapping[str, list[str]]
) -> Iterator[tuple[str, int]]:
    for line in lines:
        loop = _WHILE.search(line)
        if loop is not None:
            trips = _TRIPS.search(line)
            condition = bodies.get(loop["condition"], [])
            limit = _limit(condition, bodies) if trips is None else int(trips["n"])
            yield loop["body"], loops if limit is None else limit
            continue
        branches = _BRANCHES.search(line)
        if branches is not None:
            for name in branches[1].split(","):
                yield name.strip().lstrip("%"), 1
            continue
        for name in _CALLED.findall(line):
            yield name.lstrip("%"), 1


def _limit(condition: list[str], bodies: Mapping[str, list[str]]) -> int | None:
    """Return the constant that a condition's counter, which runs from 0, is less than, or None.

    XLA states no trip count for a loop that the collectives' pipeliner has taken a turn from.
    """
    called = [name.lstrip("%") for line in condition for name in _CALLED.findall(line)]
    lines = [*condition, *(line for name in called for line in bodies.get(name, []))]
    constants = [match["n"] for match in map(_LIMIT.search, lines) if match is not None]
    compared = [line for line in lines if " compare(" in line]
    if len(constants) != 1 or len(compared) != 1 or "direction=LT" not in compared[0]:
        return None
    return int(constants[0])


def parse_collectives(lines: list[str]) -> Iterator[Collective]:
    """Yield each collective of some lines of HLO, counted once."""
    for line in lines:
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        arrays = [
            _BYTES.get(dtype, 4) * math.prod(map(int, filter(None, sizes.split(","))))
            for dtype, sizes in _ARRAY.findall(match["type"])
        ]
        # The type of an asynchronous collective lists its operands, then its results.
        size = sum(arrays[len(arrays) // 2 :] if match["start"] else arrays)
        yield Collective(match["kind"], size, 1, _group(line))


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


def by_kind(collectives: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """Return for each kind how many run, and the sum of their bytes."""
    totals: dict[str, tuple[int, int]] = {}
    for collective in collectives:
        count, size = totals.get(collective.kind, (0, 0))
        more = collective.times * collective.bytes
        totals[collective.kind] = (count + collective.times, size + more)
    return totals


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in a step.

    Attributes:
      link: over links within its host.
      network: between hosts.
    """

    link: int
    network: int


def traffic(collectives: Iterable[Collective], devices: int, devices_per_host: int) -> Traffic:
    """Return what a device sends in ring collectives that pass from host to host.

    With n devices in a ring, an all-reduce sends 2 (n - 1) / n of its result, a reduce-scatter
    n - 1 times its result, and the others (n - 1) / n of it. The devices of a host that are in
    the ring share its network.

    Args:
      devices: number of all devices.
      devices_per_host: devices are numbered host by host.
    """
    link = network = 0.0
    for collective in collectives:
        group = collective.group or tuple(range(devices))
        share = (len(group) - 1) / len(group)
        factors = {"all-reduce": 2 * share, "reduce-scatter": len(group) * share}
        size = collective.times * collective.bytes * factors.get(collective.kind, share)
        host = group[0] // devices_per_host
        on_one_host = sum(device // devices_per_host == host for device in group)
        if on_one_host < len(group):
            network += size / on_one_host
        if on_one_host > 1:
            link += size
    return Traffic(round(link), round(network))
