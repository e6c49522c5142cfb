"""How long a compiled step takes by its schedule: products at the peak, collectives at the rates
of links and network one after another, each product and collective in the program's order."""

import dataclasses
import math
import re

from ml_collections import ConfigDict

from glm_jax.planning.collectives import (
    _CALLED,
    _TRIPS,
    _WHILE,
    _computations,
    _limit,
    parse_collectives,
    traffic,
)

_DEFINED = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(?\w+\[[\d,]*\])")
_CALLS = re.compile(r" = .*? (?P<kind>dot|custom-call|fusion|call)\((?P<operands>.*)")
_CONTRACTED = re.compile(
    r'(?:lhs_contracting_dims=\{|"lhs_contracting_dimensions":\[)(?P<axes>[\d,"]*)'
)
_STARTED = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = .*-start\(")
_AWAITED = re.compile(r"-done\(.*?%(?P<name>[\w.\-]+)\)")
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_TURNS = 3  # of a loop, after which all are alike


@dataclasses.dataclass
class Times:
    """Seconds of one device.

    Attributes:
      now: since the program began.
      products: of them, products.
      waiting: of them, waiting for collectives.
      free: when the last collective that was started ends.
    """

    now: float = 0.0
    products: float = 0.0
    waiting: float = 0.0
    free: float = 0.0

    def wait(self, until: float) -> None:
        self.waiting += max(0.0, until - self.now)
        self.now = max(self.now, until)

    def again(self, before: "Times", times: int) -> None:
        """Repeat what passed since `before`."""
        for field in dataclasses.fields(self):
            now, then = getattr(self, field.name), getattr(before, field.name)
            setattr(self, field.name, now + times * (now - then))


def times(text: str, hardware: ConfigDict, devices: int, turns: int) -> Times:
    """Return what a device's step takes, by a program's HLO as it is scheduled.

    Args:
      turns: of loops that do not say how many: those of attention, over blocks of keys.
    """
    program, taken = _Program(text, hardware, devices, turns), Times()
    program.follow(program.entry, taken)
    return taken


class _Program:
    """A program of a GPU, to be followed line by line."""

    def __init__(self, text: str, hardware: ConfigDict, devices: int, turns: int):
        self._bodies = {name: lines for name, (_, lines) in _computations(text)}
        self.entry = next(name for name, (is_entry, _) in _computations(text) if is_entry)
        self._types = {
            name: {m["name"]: m["type"] for m in map(_DEFINED.match, lines) if m}
            for name, lines in self._bodies.items()
        }
        self._hardware, self._devices, self._unsaid = hardware, devices, turns

    def follow(self, name: str, times: Times) -> None:
        ends: dict[str, float] = {}
        for line in self._bodies[name]:
            started, awaited = _STARTED.match(line), _AWAITED.search(line)
            collective = self._seconds(line)
            if collective:
                times.free = max(times.now, times.free) + collective
                if started:
                    ends[started["name"]] = times.free
                else:
                    times.wait(times.free)
            elif awaited:
                times.wait(ends.pop(awaited["name"], 0.0))
            elif loop := _WHILE.search(line):
                self._repeat(loop["body"], self._turns(line, loop["condition"]), times)
            elif operations := self._operations(name, line):
                times.products += operations / self._hardware.matrix_flops
                times.now += operations / self._hardware.matrix_flops

    def _repeat(self, body: str, turns: int, times: Times) -> None:
        for turn in range(min(turns, _TURNS)):
            before = dataclasses.replace(times)
            self.follow(body, times)
            if turn == _TURNS - 1:
                times.again(before, turns - _TURNS)

    def _turns(self, line: str, condition: str) -> int:
        trips = _TRIPS.search(line)
        if trips:
            return int(trips["n"])
        return _limit(self._bodies[condition], self._bodies) or self._unsaid

    def _seconds(self, line: str) -> float:
        """Of a collective that begins in a line."""
        seconds = 0.0
        for collective in parse_collectives([line]):
            sent = traffic([collective], self._devices, self._hardware.devices_per_host)
            over_network = sent.network / self._hardware.network_bandwidth
            seconds += max(over_network, sent.link / self._hardware.link_bandwidth)
        return seconds

    def _operations(self, name: str, line: str) -> float:
        """Of the products in a line, or in what it calls."""
        call = _CALLS.search(line)
        if call is None:
            return 0.0
        if call["kind"] in ("fusion", "call"):
            called = [n.lstrip("%") for n in _CALLED.findall(line)]
            return sum(self._operations(n, inner) for n in called for inner in self._bodies[n])
        contracted = _CONTRACTED.search(line)
        if contracted is None:
            return 0.0
        results = _ARRAY.search(line)
        first = re.search(r"%([\w.\-]+)", call["operands"])
        assert results is not None
        assert first is not None
        sizes = _sizes(_ARRAY.search(self._types[name][first[1]])[1])
        axes = _sizes(contracted["axes"].replace('"', ""))
        return 2.0 * math.prod(_sizes(results[1])) * math.prod(sizes[axis] for axis in axes)


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]
