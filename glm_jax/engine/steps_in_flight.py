"""Steps that the device runs while the host prepares the next one.

What a step needs of the one before (tokens, which slots go on) is on the device, so that the engine
starts a step before it has read the last one's tokens, and the device never waits for the host. An
end is thus found a step late: the device gives the slot nothing in the step that is under way, and
what the slot's next request needs comes behind that step.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from glm_jax.engine.page_pool import PageAllocation
from glm_jax.engine.request_state import Running
from glm_jax.engine.slots import Emitted


@dataclasses.dataclass(frozen=True)
class StepInFlight:
    """A step whose tokens have not been read.

    Attributes:
      numbers: the slot of each of its rows.
      drafts: that it runs, or None.
      emitted: what it gives, on the device.
      requests: to which it gives tokens, by slot; others may have their slots by the time that it
        is read.
      pages: of requests that it runs and that were cancelled since.
    """

    numbers: list[int]
    drafts: Int[Any, "rows drafts"] | None
    emitted: Emitted
    requests: dict[int, Running]
    pages: list[PageAllocation] = dataclasses.field(default_factory=list)

    def given(self, emitted: Emitted, running: Mapping[int, Running]) -> list[tuple[int, int]]:
        """Return row and position of each token of requests that still run.

        Args:
          emitted: what it gave, as numpy arrays.
          running: by slot.
        """
        slots, requests = self.numbers, self.requests
        rows = {row for row, slot in enumerate(slots) if slot in running}
        rows = {row for row in rows if running[slots[row]] is requests.get(slots[row])}
        return [(row, new) for row, new in np.argwhere(emitted.tokens >= 0).tolist() if row in rows]


class StepsInFlight:
    """Steps that were started and not read, in order."""

    def __init__(self) -> None:
        self._steps: collections.deque[StepInFlight] = collections.deque()

    def __len__(self) -> int:
        return len(self._steps)

    def start(self, step: StepInFlight) -> None:
        """Take a step that the device was given."""
        for x in jax.tree.leaves(step.emitted):
            x.copy_to_host_async()
        for one in step.requests.values():
            one.unread += 1
        self._steps.append(step)

    def read(self) -> tuple[StepInFlight, Emitted]:
        """Wait for the first step, and return it with what it gave, as numpy arrays."""
        step = self._steps.popleft()
        emitted: Emitted = jax.device_get(step.emitted)
        for one in step.requests.values():
            one.unread -= 1
        return step, emitted

    def is_first_for(self, running: Mapping[int, Running]) -> bool:
        """Whether the first step gives a token to a request that still runs."""
        return any(running.get(slot) is one for slot, one in self._steps[0].requests.items())

    def defer(self, pages: PageAllocation) -> bool:
        """Have pages that steps may write to freed when the last of them is read.

        Returns:
          False where there is no step.
        """
        if self._steps:
            self._steps[-1].pages.append(pages)
        return bool(self._steps)


def in_next_step(running: Mapping[int, Running]) -> dict[int, Running]:
    """Return the requests, by slot, that a further step may give a token."""
    return {slot: one for slot, one in running.items() if one.unread < one.remaining}


def max_in_flight(platform: str) -> int:
    """Return how many steps may be in flight: on a CPU one, whose cores do the host's work too."""
    return 1 if platform == "cpu" else 2


def step_widths(slots: int, is_one_cpu: bool) -> list[int]:
    """Numbers of slots that a step may run: only a CPU saves by rows what more programs cost."""
    return [*(1 << i for i in range((slots - 1).bit_length() if is_one_cpu else 0)), slots]
