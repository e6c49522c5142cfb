"""Who goes next, among requests that wait for the same slots: the most important first, and among
equally important ones those who ask take turns.

First in, first out would have a client of one answer wait for all of another's hundred.
"""

import collections
import dataclasses
from collections.abc import Hashable
from typing import Generic, TypeVar

Turn = tuple[Hashable, Hashable]  # a client, and which of its requests
ALONE: Turn = (None, None)

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where an item that waits or runs belongs."""

    turn: Turn
    priority: int


class _Level(Generic[_Item]):
    """Items of one priority that wait."""

    def __init__(self) -> None:
        self.urgent: dict[int, _Item] = {}
        # By client and request, each round's next first.
        self.rounds: dict[Hashable, dict[Hashable, dict[int, _Item]]] = {}

    def __bool__(self) -> bool:
        return bool(self.urgent or self.rounds)

    def has(self, number: int, turn: Turn) -> bool:
        """Whether an item waits here."""
        client, request = turn
        return number in self.urgent or number in self.rounds.get(client, {}).get(request, {})

    def take(self, number: int, turn: Turn) -> _Item:
        """Remove an item; its client and request go to the end of their rounds."""
        item = self.urgent.pop(number, None)
        if item is not None:
            return item
        client, request = turn
        requests = self.rounds.pop(client)
        items = requests.pop(request)
        item = items.pop(number)
        if items:
            requests[request] = items
        if requests:
            self.rounds[client] = requests
        return item


class Turns(Generic[_Item]):
    """Items that wait, each by a number of its own that counts up.

    Items of the lowest priority number go first. Among them, the client of whose items the fewest
    run goes next; of its requests, that of whose items the fewest run; of a request, what came
    first. Among equals it is by rounds.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}  # of all that wait or run
        self._levels: dict[int, _Level[_Item]] = {}  # by priority, those where any item waits
        # Items that run, of each (client,) and of each (client, request).
        self._running: collections.Counter[tuple[Hashable, ...]] = collections.Counter()
        self._waiting_count = 0

    def __len__(self) -> int:
        """Items that wait."""
        return self._waiting_count

    def add(
        self,
        number: int,
        item: _Item,
        turn: Turn = ALONE,
        is_urgent: bool = False,
        priority: int = 0,
    ) -> None:
        """Has an item wait.

        Args:
          is_urgent: before all of its priority that are not.
          priority: lower goes first.
        """
        entry = _Entry(turn, priority)
        self._entries[number] = entry
        self._wait(number, item, entry, is_urgent)

    def _wait(self, number: int, item: _Item, entry: _Entry, is_urgent: bool) -> None:
        self._waiting_count += 1
        level = self._levels.setdefault(entry.priority, _Level())
        if is_urgent:
            level.urgent[number] = item
        else:
            client, request = entry.turn
            level.rounds.setdefault(client, {}).setdefault(request, {})[number] = item

    def peek(self) -> tuple[int, _Item]:
        """Return what goes next, of one that waits at least."""
        level = self._levels[min(self._levels)]
        if level.urgent:
            return min(level.urgent.items(), key=lambda pair: pair[0])
        client = min(level.rounds, key=lambda client: self._running[(client,)])
        requests = level.rounds[client]
        request = min(requests, key=lambda request: self._running[client, request])
        return next(iter(requests[request].items()))

    def take(self, number: int) -> _Item:
        """Has an item run, which then waits no more; its client and request go to the end of
        their rounds."""
        entry = self._entries[number]
        level = self._levels[entry.priority]
        item = level.take(number, entry.turn)
        if not level:
            del self._levels[entry.priority]
        self._waiting_count -= 1
        self._running.update([entry.turn[:1], entry.turn])
        return item

    def put_back(self, number: int, item: _Item) -> None:
        """Has an item that runs wait again, before all of its priority that came later."""
        entry = self._entries[number]
        self._stop(entry.turn)
        self._wait(number, item, entry, is_urgent=True)

    def drop(self, number: int) -> None:
        """Forgets an item, which waits or runs, if it is there."""
        entry = self._entries.get(number)
        if entry is None:
            return
        level = self._levels.get(entry.priority)
        if level is not None and level.has(number, entry.turn):
            self.take(number)
        del self._entries[number]
        self._stop(entry.turn)

    def _stop(self, turn: Turn) -> None:
        """Count an item of a client and request that no longer runs."""
        for key in (turn[:1], turn):
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]
