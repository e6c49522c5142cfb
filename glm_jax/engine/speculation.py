"""Speculative decoding: tokens that may come next, guessed from a request's own text.

A decode step reads all weights whatever the number of its tokens. So it runs the guesses (drafts)
behind a request's next token, and `choosing.choose_checked` accepts the first of them that are what
would have been chosen without. A request whose drafts are not accepted gets none for a while.
"""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from glm_jax import processes
from glm_jax.engine.draft_model import DraftModel
from glm_jax.engine.prompt import Prompt

_MARGIN = 1.05  # for what measurements and expectations are wrong by
_ROUNDS = (2, 30)  # the fewest and the most, besides the first two
_MEASURING = 0.3  # seconds, about
_NGRAMS = (3, 2)  # tokens in a row that must have come before, the longest first
# Drafts that count as accepted and as refused before there are any; what is counted fades by each
# token, so that a request that is refused two of them tries again some 50 tokens later.
_ACCEPTED, _REFUSED = 2.0, 1.0
_FADING = 0.99


class DraftCounts(NamedTuple):
    """How many drafts were checked by steps, and how many of them accepted."""

    checked: int
    accepted: int


class Acceptance:
    """How many of a request's drafts were accepted, the latest counted most."""

    def __init__(self) -> None:
        self._accepted = self._refused = 0.0

    def fade(self) -> None:
        """Take a token of the text, which makes what was counted before matter less."""
        self._accepted *= _FADING
        self._refused *= _FADING

    def expected(self, count: int) -> float:
        """How many of so many drafts will be accepted."""
        accepted = self._accepted + _ACCEPTED
        share = accepted / (accepted + self._refused + _REFUSED)
        return float(sum(share**i for i in range(1, count + 1)))

    def judge(self, drafted: int, accepted: int) -> None:
        """Take what became of a step's drafts."""
        self._accepted += accepted
        self._refused += accepted < drafted


class Drafter:
    """Guesses the next tokens of one request: what followed its latest tokens the last time.

    Attributes:
      text: prompt and answer so far.
      guesses, modelled: what became of these drafts, and of a draft model's.
    """

    def __init__(self, tokens: Iterable[int]):
        """
        Args:
          tokens: of the prompt.
        """
        self.text: list[int] = []
        # Where the latest continuation of n tokens in a row begins.
        self._following: dict[tuple[int, ...], int] = {}
        self.guesses, self.modelled = Acceptance(), Acceptance()
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Take the next token of the text."""
        end = len(self.text)
        for size in _NGRAMS:
            if end >= size:
                self._following[tuple(self.text[end - size :])] = end
        self.text.append(token)
        self.guesses.fade()
        self.modelled.fade()

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that may come next."""
        for size in _NGRAMS:
            begin = self._following.get(tuple(self.text[-size:]))
            if begin is not None:
                # Past its end the text goes on as it did before.
                period = len(self.text) - begin
                return [self.text[begin + i % period] for i in range(count)]
        return []


class Speculation:
    """The drafters of an engine's running requests, and when drafts are worth a step's time.

    Drafts are what a request's own text suggests; where it suggests nothing, those of a draft
    model, if there is one.

    Attributes:
      counts: of all drafts so far.
    """

    def __init__(self, count: int, mesh: Mesh | None, model: DraftModel | None = None):
        """
        Args:
          count: drafts of a request and step at most; 0 for none.
          mesh: of the engine, whose processes all take the same steps.
        """
        self.counts = DraftCounts(0, 0)
        self._count, self._is_shared = count, mesh is not None and mesh.is_multi_process
        self._model = model if count else None
        self._drafters: dict[int, Drafter] = {}  # by slot
        self._costs: dict[int, tuple[float, float]] = {}  # see `measure`
        self._modelled: set[int] = set()  # slots whose latest drafts are the model's
        self._paused: set[int] = set()  # slots whose next step is to be without drafts

    def begin(self, slot: int, prompt: Prompt, sop: int) -> None:
        """Take the request of a slot."""
        if self._count:
            self._drafters[slot] = Drafter(prompt.tokens(sop))
            self._paused.discard(slot)
        if self._model is not None:
            self._model.begin(slot, prompt)

    def propose(
        self,
        numbers: Sequence[int],
        draft_rooms: Callable[[], Mapping[int, int]],
        run: Callable[[Any], object],
    ) -> Int[np.ndarray, "rows drafts"] | None:
        """Drafts for a step of these slots; None where steps without give more tokens in the time.

        Args:
          draft_rooms: returns how many drafts each running request has room for, by slot.
          run: as for `measure`.
        """
        self._modelled = set()
        if not self._count:
            return None
        rooms = draft_rooms()
        counts = {
            slot: min(self._count, room)
            for slot, room in rooms.items()
            if room and slot not in self._paused
        }
        self._paused.clear()
        own = {slot: self._drafters[slot].propose(count) for slot, count in counts.items()}
        others = {slot: count for slot, count in counts.items() if not own[slot]}
        of_own = sum(self._drafters[slot].guesses.expected(len(own[slot])) for slot in counts)
        of_model = sum(self._drafters[slot].modelled.expected(n) for slot, n in others.items())
        if self._model is None:
            of_model = 0.0
        if not of_own + of_model:
            return None
        checking, drafting = self.measure(len(numbers), run)
        gain = lambda expected: 1 + expected / len(rooms)
        by_own, by_both = gain(of_own) / checking, gain(of_own + of_model) / (checking + drafting)
        if max(by_own, by_both) <= _MARGIN:
            return None
        drafts = self._nothing(len(numbers))
        if of_model and by_both > by_own:
            assert self._model is not None
            self._modelled = set(others)
            texts = {slot: self._drafters[slot].text for slot in others}
            drafts = self._model.propose(numbers, texts, others)
        for row, slot in enumerate(numbers):
            if own.get(slot):
                drafts[row, : len(own[slot])] = own[slot]
        return drafts

    def measure(self, rows: int, run: Callable[[Any], object]) -> tuple[float, float]:
        """Time of a step with drafts over that of one without, and of a draft model's drafts over
        that, the best of a few each, when this is first asked for.

        Args:
          run: a step of so many rows to its end, with drafts or None; it changes no request.
        """
        if self._count and rows not in self._costs:
            model = self._model
            works: dict[str, Callable[[], object]] = {
                "plain": lambda: run(None),
                "checking": lambda: run(self._nothing(rows)),
                "drafting": lambda: None if model is None else model.run_idle(rows),
            }
            agree = processes.agree if self._is_shared else lambda number: number
            seconds: dict[str, list[float]] = {name: [] for name in works}

            def run_all(rounds: int) -> None:
                for _ in range(rounds):
                    for name, work in works.items():
                        began = time.perf_counter()
                        work()
                        seconds[name].append(time.perf_counter() - began)

            run_all(2)  # the first compiles
            # Short steps are measured often: others who use the machine make some of them longer.
            enough = _MEASURING / sum(taken[1] for taken in seconds.values())
            run_all(int(agree(float(np.clip(enough, *_ROUNDS)))))
            plain, checking, drafting = (min(taken[1:]) for taken in seconds.values())
            self._costs[rows] = max(1.0, agree(checking / plain)), agree(drafting / plain)
        return self._costs.get(rows, (1.0, 0.0))

    def warm_up(self, widths: Sequence[int], run: Callable[[int, Any], object]) -> None:
        """Compiles and measures what drafts need.

        Args:
          widths: numbers of rows that steps have.
          run: as for `measure`, after the number of rows.
        """
        if self._model is not None:
            self._model.warm_up(widths)
        for rows in widths:
            self.measure(rows, functools.partial(run, rows))

    def take(self, numbers: Sequence[int], drafts: Any, tokens: np.ndarray) -> None:
        """Take what a step gave.

        Args:
          drafts: that it ran, or None.
          tokens: int32 [rows, new], -1 from where there is none.
        """
        for row, slot in enumerate(numbers):
            if (drafter := self._drafters.get(slot)) is None:
                continue
            given = tokens[row][tokens[row] >= 0].tolist()
            if drafts is not None and (drafted := int((drafts[row] >= 0).sum())):
                kind = drafter.modelled if slot in self._modelled else drafter.guesses
                accepted = max(len(given) - 1, 0)
                kind.judge(drafted, accepted)
                if not given:
                    self._paused.add(slot)
                self.counts = DraftCounts(
                    self.counts.checked + drafted, self.counts.accepted + accepted
                )
            for token in given:
                drafter.add(token)

    def shapes(self, rows: int) -> list[Int[np.ndarray, "rows drafts"] | None]:
        """Return a step's drafts in each shape that they come in, without any draft."""
        return [None, self._nothing(rows)] if self._count else [None]

    def _nothing(self, rows: int) -> Int[np.ndarray, "rows drafts"]:
        return np.full((rows, self._count), -1, np.int32)
