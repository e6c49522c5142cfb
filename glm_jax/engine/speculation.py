"""Speculative decoding: tokens that may come next, guessed from a request's own text.

A decode step reads all weights whatever the number of its tokens. So it runs the guesses (drafts)
behind a request's next token, and `slots.choose_checked` accepts the first of them that are what
would have been chosen without. A request whose drafts are not accepted gets none for a while.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from glm_jax import processes

_MARGIN = 1.05  # for what measurements and expectations are wrong by
_ROUNDS = 3
_NGRAMS = (3, 2)  # tokens in a row that must have come before, the longest first
# Drafts that count as accepted and as refused before there are any; what is counted fades by each
# token, so that a request that is refused two of them tries again some 50 tokens later.
_ACCEPTED, _REFUSED = 2.0, 1.0
_FADING = 0.99


class DraftCounts(NamedTuple):
    """How many drafts were checked by steps, and how many of them accepted."""

    checked: int
    accepted: int


class Drafter:
    """Guesses the next tokens of one request: what followed its latest tokens the last time."""

    def __init__(self, tokens: Iterable[int]):
        """
        Args:
          tokens: of the prompt.
        """
        self._tokens: list[int] = []
        # Where the latest continuation of n tokens in a row begins.
        self._following: dict[tuple[int, ...], int] = {}
        self._accepted = self._refused = 0.0
        self._is_paused = False
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Takes the next token of the text."""
        end = len(self._tokens)
        for size in _NGRAMS:
            if end >= size:
                self._following[tuple(self._tokens[end - size :])] = end
        self._tokens.append(token)
        self._accepted *= _FADING
        self._refused *= _FADING

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that may come next."""
        is_paused, self._is_paused = self._is_paused, False
        if is_paused:
            return []
        text = self._tokens
        for size in _NGRAMS:
            begin = self._following.get(tuple(text[-size:]))
            if begin is not None:
                # Past its end the text goes on as it did before.
                period = len(text) - begin
                return [text[begin + i % period] for i in range(count)]
        return []

    def expected(self, count: int) -> float:
        """How many of so many drafts will be accepted, by what became of earlier ones."""
        accepted = self._accepted + _ACCEPTED
        share = accepted / (accepted + self._refused + _REFUSED)
        return float(sum(share**i for i in range(1, count + 1)))

    def judge(self, drafted: int, accepted: int) -> None:
        """Takes what became of a step's drafts.

        Args:
          accepted: -1 where the step gave not even the token before them.
        """
        self._accepted += max(accepted, 0)
        self._refused += accepted < drafted
        self._is_paused = accepted < 0


class Speculation:
    """The drafters of an engine's running requests, and when drafts are worth a step's time.

    Attributes:
      counts: of all drafts so far.
    """

    def __init__(self, count: int, mesh: Mesh | None):
        """
        Args:
          count: drafts of a request and step at most; 0 for none.
          mesh: of the engine, whose processes all take the same steps.
        """
        self.counts = DraftCounts(0, 0)
        self._count, self._is_shared = count, mesh is not None and mesh.is_multi_process
        self._drafters: dict[int, Drafter] = {}  # by slot
        self._costs: dict[int, float] = {}  # of a step with drafts, by the number of its rows

    def begin(self, slot: int, tokens: Iterable[int]) -> None:
        """Takes the request of a slot, by its prompt's tokens."""
        if self._count:
            self._drafters[slot] = Drafter(tokens)

    def propose(
        self, numbers: Sequence[int], rooms: Mapping[int, int], run: Callable[[Any], object]
    ) -> Int[np.ndarray, "rows drafts"] | None:
        """Drafts for a step of these slots; None where steps without give more tokens in the time.

        Args:
          rooms: how many drafts each running request has room for, by slot.
          run: as for `measure`.
        """
        if not self._count:
            return None
        drafts, expected = self._nothing(len(numbers)), 0.0
        for row, slot in enumerate(numbers):
            if slot in rooms:
                drafter = self._drafters[slot]
                proposed = drafter.propose(min(self._count, rooms[slot]))
                drafts[row, : len(proposed)] = proposed
                expected += drafter.expected(len(proposed))
        if not expected:
            return None
        gain = 1 + expected / len(rooms)
        return drafts if gain > _MARGIN * self.measure(len(numbers), run) else None

    def measure(self, rows: int, run: Callable[[Any], object]) -> float:
        """Time of a step with drafts over that of one without, the best of a few each, when this is
        first asked for.

        Args:
          run: a step of so many rows to its end, with drafts or None; it changes no request.
        """
        if self._count and rows not in self._costs:
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(_ROUNDS + 1):  # the first compiles
                for has_drafts, taken in seconds.items():
                    began = time.perf_counter()
                    run(self._nothing(rows) if has_drafts else None)
                    taken.append(time.perf_counter() - began)
            plain, drafted = (min(taken[1:]) for taken in seconds.values())
            cost = max(1.0, drafted / plain)
            self._costs[rows] = processes.agree(cost) if self._is_shared else cost
        return self._costs.get(rows, 1.0)

    def take(self, numbers: Sequence[int], drafts: Any, tokens: np.ndarray) -> None:
        """Takes what a step gave.

        Args:
          drafts: that it ran, or None.
          tokens: int32 [rows, new], -1 from where there is none.
        """
        for row, slot in enumerate(numbers):
            if (drafter := self._drafters.get(slot)) is None:
                continue
            given = tokens[row][tokens[row] >= 0].tolist()
            if drafts is not None and (drafted := int((drafts[row] >= 0).sum())):
                drafter.judge(drafted, len(given) - 1)
                checked, accepted = self.counts
                self.counts = DraftCounts(checked + drafted, accepted + max(len(given) - 1, 0))
            for token in given:
                drafter.add(token)

    def _nothing(self, rows: int) -> Int[np.ndarray, "rows drafts"]:
        return np.full((rows, self._count), -1, np.int32)
