"""Which requests wait, which have slots, and which pages each has; on the host alone.

A request gets pages for its prompt when it is admitted, and one more whenever its answer has
filled those it has. Where there is none left, the request that goes last (the highest priority
number, then the youngest) is preempted: its pages are free, it waits before all of its priority
that came later, and is prefilled again with its answer so far. So the request that goes first
always goes on, and all others after it: there is room for the longest request alone.

Requests with the same prompt share its pages, as long as one of them has it there. In GLM a
context's first tokens see its last, so that only whole prompts can be shared, not beginnings.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from glm_jax.config import GLMConfig
from glm_jax.engine.engine_settings import EngineSettings
from glm_jax.engine.fair_queue import Turn, Turns
from glm_jax.engine.page_pool import PageAllocation, PagePool, cache_pages, page_count
from glm_jax.engine.prefill_batch import prefill_length, prefill_width
from glm_jax.engine.request import Request
from glm_jax.engine.request_state import Admission, Admitted, Queued, Running

_TYPICAL_LENGTH = 512  # tokens of a request that the cache has room for by default, each slot
_COPIES = 4  # pages of each shard that a program copies


class SchedulingCounts(NamedTuple):
    """How many requests were preempted, and how many prompts were not prefilled, because another
    request had them."""

    preemptions: int
    shared_prompts: int


@dataclasses.dataclass(frozen=True)
class SchedulerLimits:
    """What there is room for.

    Attributes:
      shards: groups of devices that have slots and pages of their own.
      slots: of all of them.
      pages: of each, page 0 included, and no fewer than the longest request takes.
      max_length: tokens of a request.
      prefill_width: tokens of texts that are prefilled at once, unless one is longer.
      step_tokens: that a step may add to a request.
      prefill_steps: within how many steps texts of so many tokens are prefilled, at most.
    """

    shards: int
    slots: int
    pages: int
    page_size: int
    max_length: int
    prefill_width: int
    step_tokens: int
    prefill_steps: Callable[[int], int]


def scheduler_limits(
    settings: EngineSettings, config: GLMConfig, shards: int, slots: int
) -> SchedulerLimits:
    """Return what an engine has room for.

    Args:
      shards, slots: see `SchedulerLimits`.
    """
    longest, size = settings.longest(config), settings.page_size
    typical = page_count(min(longest, _TYPICAL_LENGTH), size) * size
    return SchedulerLimits(
        shards=shards,
        slots=slots,
        pages=cache_pages(settings.cache_tokens or slots * typical, longest, shards, size),
        page_size=size,
        max_length=longest,
        prefill_width=settings.prefill_width,
        step_tokens=1 + settings.speculate,
        prefill_steps=functools.partial(settings.prefill_steps, config.num_layers),
    )


class Scheduler:
    """The queue, the slots and the pages of an engine.

    Attributes:
      running: requests that get tokens, by slot.
      entering: requests that are prefilled, by slot.
      counts: so far.
    """

    def __init__(self, limits: SchedulerLimits):
        self.running: dict[int, Running] = {}
        self.entering: dict[int, Admitted] = {}
        self.counts = SchedulingCounts(0, 0)
        self.queue: Turns[Queued] = Turns()
        self.pool = PagePool(limits.shards, limits.pages, limits.page_size)
        self._limits = limits

    @property
    def is_idle(self) -> bool:
        """Whether no request is there."""
        return not (self.queue or self.running or self.entering)

    def add(self, request_id: int, request: Request, turn: Turn, is_urgent: bool) -> None:
        """Have a request wait; see `Turns.add`."""
        self.queue.add(request_id, Queued(request), turn, is_urgent, request.priority)

    def free_slots(self) -> list[int]:
        """Slots that no request has."""
        taken = {*self.running, *self.entering}
        return [slot for slot in range(self._limits.slots) if slot not in taken]

    def shard(self, slot: int) -> int:
        """Return the group of devices that a slot belongs to."""
        return slot * self._limits.shards // self._limits.slots

    def admit(self) -> Admission:
        """Give slots and pages to requests that wait, by their turns, as long as the next one
        fits."""
        admission = Admission([], [], [])
        free, used = self.free_slots(), [0] * self._limits.shards
        while self.queue and free:
            request_id, queued = self.queue.peek()
            admitted = self._shared(request_id, queued, free, used, admission)
            if admitted is not None:
                self._count(shared_prompts=1)
            else:
                admitted = self._prefilled(request_id, queued, free, used)
                if admitted is None:
                    break
                admission.prefilled.append(admitted)
                used[admitted.allocation.shard] += prefill_length(queued.text)
            self.queue.take(request_id)
            self.entering[admitted.slot] = admitted
            free.remove(admitted.slot)
        return admission

    def _prefilled(
        self, request_id: int, queued: Queued, free: list[int], used: list[int]
    ) -> Admitted | None:
        """Return a slot and pages for a request whose text is to be prefilled; None where there is
        no room."""
        count = prefill_length(queued.text)
        width = self._limits.prefill_width
        width = width if any(used) else max(count, width)
        possible = [
            slot
            for slot in free
            if used[self.shard(slot)] + count <= width
            and self._fits(queued, PageAllocation(self.shard(slot), ()), used)
        ]
        if not possible:
            return None
        # The shard with the fewest tokens, so that rows fill evenly.
        slot = min(possible, key=lambda slot: used[self.shard(slot)])
        own = PageAllocation(self.shard(slot), ())
        return self._admitted(request_id, queued, slot, own)

    def _shared(
        self,
        request_id: int,
        queued: Queued,
        free: list[int],
        used: list[int],
        admission: Admission,
    ) -> Admitted | None:
        """Return a slot and pages for a request whose prompt another one has, added to the others
        of its kind; None where there is none, or no room beside it."""
        if queued.answer:
            return None
        key, shards = queued.request.sharing_key, {self.shard(slot) for slot in free}
        has_it = lambda one: one.request.sharing_key == key and self.shard(one.slot) in shards
        running = [one for one in self.running.values() if has_it(one.admitted)]
        prefilled = [one for one in admission.prefilled if has_it(one)]
        if not running and not prefilled:
            return None
        pages = (running or prefilled)[0].allocation
        full, rest = divmod(prefill_length(queued.text), self._limits.page_size)
        slot = next(slot for slot in free if self.shard(slot) == pages.shard)
        shared = PageAllocation(pages.shard, pages.pages[:full])
        if not self._fits(queued, shared, used):
            return None
        admitted = self._admitted(request_id, queued, slot, self.pool.fork(shared))
        if rest:
            copy = pages.pages[full], admitted.allocation.pages[full]
            admitted = dataclasses.replace(admitted, copy=copy)
        (admission.ready if running else admission.followers).append(admitted)
        return admitted

    def _admitted(
        self, request_id: int, queued: Queued, slot: int, shared: PageAllocation
    ) -> Admitted:
        text, request = queued.text, queued.request
        return Admitted(
            request_id=request_id,
            request=request,
            slot=slot,
            allocation=self.pool.extend(shared, len(text)),
            text=text,
            end=self._end(request),
            answer=queued.answer,
        )

    def _end(self, request: Request) -> int:
        longest = self._limits.max_length
        max_tokens = longest if request.max_tokens is None else request.max_tokens
        return min(longest, len(request.prompt) + max_tokens)

    def _fits(self, queued: Queued, shared: PageAllocation, used: list[int]) -> bool:
        """Whether there are pages for a request and for what those that run may come to while it is
        prefilled.

        Args:
          shared: pages that the request need not have for itself.
          used: tokens to be prefilled before it, of each shard.
        """
        shard, pool, limits = shared.shard, self.pool, self._limits
        width = prefill_width(max(*used, used[shard] + prefill_length(queued.text)))
        # Half a page for each, or else one is soon preempted, and was prefilled for little.
        ahead = max(limits.prefill_steps(width) * limits.step_tokens, limits.page_size // 2)
        growing = [
            (shared, len(queued.text), self._end(queued.request)),
            *((one.allocation, one.next_length, one.admitted.end) for one in self.running.values()),
            *((one.allocation, len(one.text), one.end) for one in self.entering.values()),
        ]
        needed = sum(
            pool.missing(allocation, min(end, length + ahead))
            for allocation, length, end in growing
            if allocation.shard == shard
        )
        return needed <= pool.free_pages(shard)

    def _count(self, preemptions: int = 0, shared_prompts: int = 0) -> None:
        before = self.counts
        self.counts = SchedulingCounts(
            before.preemptions + preemptions, before.shared_prompts + shared_prompts
        )

    def enter(self, admitted: Admitted, end_tokens: frozenset[int]) -> Running:
        """Have an admitted request, whose text is in its pages, run."""
        del self.entering[admitted.slot]
        running = Running(admitted, end_tokens, admitted.allocation, list(admitted.answer))
        self.running[admitted.slot] = running
        return running

    def give_up(self, admitted: Admitted) -> PageAllocation:
        """End a request that was cancelled while it was prefilled; its slot is free.

        Returns:
          Its pages, which the caller frees.
        """
        return self.entering.pop(admitted.slot).allocation

    def grow(self) -> tuple[list[int], dict[int, tuple[int, ...]]]:
        """Give requests that run the pages that the next step writes to.

        Returns:
          Slots whose requests were preempted; and by slot, all pages of those that have more.
        """
        running = self.running.values()
        if not any(self.pool.missing(one.allocation, self._wanted(one)) for one in running):
            return [], {}
        preempted: list[int] = []
        before = {slot: one.allocation for slot, one in self.running.items()}
        ranked = sorted(running, key=lambda one: one.rank)
        for one in ranked:
            while one.admitted.slot in self.running and not self._extend(one, one.next_length):
                preempted.append(self._preempt_last(one.allocation.shard))
        for one in ranked:  # drafts have pages where some are left
            if one.admitted.slot in self.running:
                self._extend(one, self._wanted(one))
        grown = {
            slot: one.allocation.pages
            for slot, one in self.running.items()
            if one.allocation is not before[slot]
        }
        return preempted, grown

    def _wanted(self, one: Running) -> int:
        """Tokens that a request would have pages for in the next step, drafts included."""
        drafted = one.length + min(self._limits.step_tokens, one.remaining) - 1
        return max(one.next_length, drafted)

    def can_grow(self) -> bool:
        """Whether `grow` would preempt no request."""
        missing = [0] * self._limits.shards
        for one in self.running.values():
            missing[one.allocation.shard] += self.pool.missing(one.allocation, one.next_length)
        return all(count <= self.pool.free_pages(shard) for shard, count in enumerate(missing))

    def _extend(self, one: Running, tokens: int) -> bool:
        missing = self.pool.missing(one.allocation, tokens)
        if missing > self.pool.free_pages(one.allocation.shard):
            return False
        if missing:
            one.allocation = self.pool.extend(one.allocation, tokens)
        return True

    def _preempt_last(self, shard: int) -> int:
        """Preempt the request that goes last in a shard, and return its slot."""
        rivals = (one for one in self.running.values() if one.allocation.shard == shard)
        last = max(rivals, key=lambda one: one.rank)
        admitted = last.admitted
        del self.running[admitted.slot]
        self.pool.free(last.allocation)
        waiting = Queued(admitted.request, tuple(last.answer))
        self.queue.put_back(admitted.request_id, waiting)
        self._count(preemptions=1)
        return admitted.slot

    def draft_rooms(self) -> dict[int, int]:
        """Drafts that each request has pages for, and that its answer has room for, by slot."""
        size = self._limits.page_size
        return {
            slot: min(one.remaining - 1, len(one.allocation.pages) * size - one.length)
            for slot, one in self.running.items()
        }

    def leave(self, slot: int) -> PageAllocation:
        """End the request of a slot.

        Returns:
          Its pages, which the caller frees.
        """
        one = self.running.pop(slot)
        self.queue.drop(one.admitted.request_id)
        return one.allocation


def page_copies(
    followers: Iterable[Admitted], shards: int
) -> Iterator[Int[np.ndarray, "copies 2"]]:
    """Yield sources and targets for `paged_cache.copy_pages`, some at a time: the page in which
    each follower's shared prompt ends, to which it will write."""
    copies: list[list[tuple[int, int]]] = [[] for _ in range(shards)]
    for one in followers:
        if one.copy is not None:
            copies[one.allocation.shard].append(one.copy)
    while any(copies):
        some = no_copies(shards).reshape(shards, _COPIES, 2)
        for pairs, of_shard in zip(some, copies, strict=True):
            count = min(_COPIES, len(of_shard))
            pairs[:count] = of_shard[:count] if count else 0
            del of_shard[:count]
        yield some.reshape(-1, 2)


def no_copies(shards: int) -> Int[np.ndarray, "copies 2"]:
    """Return what copies page 0 alone, which no one reads."""
    return np.zeros((shards * _COPIES, 2), np.int32)
