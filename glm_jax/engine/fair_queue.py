"""Who goes next, among requests that wait for the same slots: those who ask take turns.

First in, first out would have a client of one answer wait for all of another's hundred.
"""

import collections
from collections.abc import Hashable
from typing import Generic, TypeVar

Turn = tuple[Hashable, Hashable]  # a client, and which of its requests
ALONE: Turn = (None, None)

_Item = TypeVar("_Item")


class Turns(Generic[_Item]):
    """Items that wait, each by a number of its own.

    The client of whose items the fewest run goes next; of its requests, that of whose items
    the fewest run; of a request, what came first. Among equals it is by rounds.
    """

    def __init__(self) -> None:
        self._turns: dict[int, Turn] = {}  # of all that wait or run
        # By client and request, each round's next first.
        self._waiting: dict[Hashable, dict[Hashable, dict[int, _Item]]] = {}
        self._urgent: dict[int, _Item] = {}
        # Items that run, of each (client,) and of each (client, request).
        self._running: collections.Counter[tuple[Hashable, ...]] = collections.Counter()
        self._waiting_count = 0

    def __len__(self) -> int:
        """Items that wait."""
        return self._waiting_count

    def add(self, number: int, item: _Item, turn: Turn = ALONE, is_urgent: bool = False) -> None:
        """Has an item wait.

        Args:
          is_urgent: before all that are not.
        """
        self._turns[number] = turn
        self._waiting_count += 1
        if is_urgent:
            self._urgent[number] = item
        else:
            client, request = turn
            self._waiting.setdefault(client, {}).setdefault(request, {})[number] = item

    def peek(self) -> tuple[int, _Item]:
        """What goes next, of one that waits at least."""
        if self._urgent:
            return next(iter(self._urgent.items()))
        client = min(self._waiting, key=lambda client: self._running[(client,)])
        requests = self._waiting[client]
        request = min(requests, key=lambda request: self._running[client, request])
        return next(iter(requests[request].items()))

    def take(self, number: int) -> _Item:
        """Has an item run, which then waits no more; its client and request go to the end of
        their rounds."""
        client, request = turn = self._turns[number]
        self._running.update([(client,), turn])
        self._waiting_count -= 1
        item = self._urgent.pop(number, None)
        if item is not None:
            return item
        requests = self._waiting.pop(client)
        items = requests.pop(request)
        item = items.pop(number)
        if items:
            requests[request] = items
        if requests:
            self._waiting[client] = requests
        return item

    def drop(self, number: int) -> None:
        """Forgets an item, which waits or runs, if it is there."""
        turn = self._turns.get(number)
        if turn is None:
            return
        if self._is_waiting(number, turn):
            self.take(number)
        del self._turns[number]
        for key in ((turn[0],), turn):
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]

    def _is_waiting(self, number: int, turn: Turn) -> bool:
        client, request = turn
        return number in self._urgent or number in self._waiting.get(client, {}).get(request, {})
