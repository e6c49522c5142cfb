"""Continuous batching: requests enter and leave a running batch one by one.

The life of a request: `submit` checks it and puts it into the queue. When its turn has come, and a
slot and pages are free for all of its tokens, it is admitted: it gets both, and its prompt joins a
prefill batch. The batch runs through the layers, as many between two steps as the prefill budget
allows. Then the request has a row in its slot, and each step gives it a token, or several by drafts
(`speculation`), until an end token, its length, a failure or `cancel` ends it, which frees both.

What always holds:
- A request is in one place: in the queue, in the one prefill batch, or in a slot.
- It has pages for all tokens that it may come to before it is prefilled, so that none ever waits,
  or is put out, for want of memory.
- A slot without a request is inactive on the device: it writes to page 0, which no one reads.
- A request's failure reaches no other: what it left in its pages is cleared before others have
  them.
- Shapes never depend on requests, so that `warm_up` compiles all there is to compile.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine import step_functions
from glm_jax.engine.draft_model import DraftModel, SmallModel
from glm_jax.engine.fair_queue import ALONE, Turn, Turns
from glm_jax.engine.generation_settings import SETTINGS
from glm_jax.engine.page_pool import (
    PAGE_SIZE,
    PageAllocation,
    PagePool,
    cache_pages,
    page_count,
    table_size,
)
from glm_jax.engine.prefill_batch import (
    PrefillBatch,
    make_prefill_batch,
    prefill_length,
    prefill_width,
    prefill_widths,
)
from glm_jax.engine.prompt import PromptError, check_end_tokens, check_prompt
from glm_jax.engine.request import Request, Token
from glm_jax.engine.request_state import Admitted, Prefill, Running
from glm_jax.engine.slots import (
    Emitted,
    admit,
    check_sampling,
    empty_slot,
    empty_slots,
    release,
    request_row,
)
from glm_jax.engine.speculation import DraftCounts, Speculation
from glm_jax.model.device_layout import prepare
from glm_jax.model.layer_stacks import as_layers
from glm_jax.model.params import GLMParams
from glm_jax.sharding import mesh_of, on_mesh, row_shards

_TYPICAL_LENGTH = 512  # tokens of a request that the cache has room for by default, each slot


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How much an engine does at once.

    Attributes:
      slots: requests that run together; rounded up to what the mesh divides.
      max_length: tokens of a request, prompt, sop and answer; the model's positions by default.
      cache_tokens: that the cache has room for, of all requests together; by default 512 a
        slot, or max_length where that is less, and never less than one longest request.
      page_size: tokens of a page.
      prefill_width: tokens of prompts that are prefilled at once, unless one is longer.
      prefill_budget: tokens that are prefilled between two steps at most, in whole layers;
        None fills all slots before the next step, which is best where no one waits for tokens.
      speculate: draft tokens of each request that a step checks at most (see `speculation`).
    """

    slots: int = 16
    max_length: int | None = None
    cache_tokens: int | None = None
    page_size: int = PAGE_SIZE
    prefill_width: int = 512
    prefill_budget: int | None = None
    speculate: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            lowest = 0 if name == "speculate" else 1
            if value is not None and value < lowest:
                raise PromptError(f"{name}={value}: at least {lowest}")


class Engine:
    """A model with slots. Not for several threads at once.

    Attributes:
      special: the special tokens.
      max_length: tokens of a request at most.
    """

    def __init__(
        self,
        params: GLMParams,
        config: GLMConfig,
        settings: EngineSettings | None = None,
        special_tokens: SpecialTokens | None = None,
        small_model: SmallModel | None = None,
    ):
        """Makes pages and slots on the mesh that the parameters lie on.

        Args:
          small_model: writes drafts where `settings.speculate` says how many.

        Raises:
          PromptError: special tokens that are unknown or not in the vocabulary, a max_length past
            the model's positions, or a small model with other tokens or fewer positions.
        """
        settings = settings or EngineSettings()
        special = special_tokens or config.special_tokens
        if special is None:
            raise PromptError("this model's special tokens are not known: pass special_tokens")
        check_end_tokens(dataclasses.astuple(special), config)
        self.special: SpecialTokens = special
        self.max_length = settings.max_length or config.max_sequence_length
        if self.max_length > config.max_sequence_length:
            raise PromptError(
                f"max_length={self.max_length} is past the model's {config.max_sequence_length} "
                "positions"
            )
        self._config, self._settings, self._mesh = config, settings, mesh_of(params)
        self._params = prepare(params)
        self._shards = row_shards(self._mesh)
        self._is_unrolled = as_layers(self._params.layers).is_apart
        self._slot_count = -(-settings.slots // self._shards) * self._shards
        self._step_widths = self._widths_of_steps()
        self._make_state()
        self._request_count = 0
        self._queue: Turns[Request] = Turns()
        self._running: dict[int, Running] = {}  # by slot
        self._prefill: Prefill | None = None
        self._unchecked: list[PageAllocation] = []  # pages whose contents no step has looked at
        self._speculation = Speculation(
            settings.speculate, self._mesh, self._draft_model(small_model)
        )

    def _draft_model(self, small: SmallModel | None) -> DraftModel | None:
        count = self._settings.speculate
        if small is None or not count:
            return None
        small.check(self._config, self.max_length)
        return DraftModel(small, self.special.sop, self._slot_count, self.max_length, count)

    def _widths_of_steps(self) -> list[int]:
        """Slots that a step may run: only a CPU saves by rows what more programs cost."""
        device, *_ = jax.tree.leaves(self._params)[0].devices()
        is_one_cpu = self._is_unrolled and self._mesh is None and device.platform == "cpu"
        halves = range((self._slot_count - 1).bit_length() if is_one_cpu else 0)
        return [*(1 << i for i in halves), self._slot_count]

    def _make_state(self) -> None:
        size, longest = self._settings.page_size, self.max_length
        typical = page_count(min(longest, _TYPICAL_LENGTH), size) * size
        tokens = self._settings.cache_tokens or self._slot_count * typical
        pages = cache_pages(tokens, longest, self._shards, size)
        self._pool = PagePool(self._shards, pages, size)
        self._pages_a_layer = 0 if self._is_unrolled else pages
        self._empty = empty_slot(self._config, longest, table_size(longest, size))
        with on_mesh(self._mesh):
            slots = empty_slots(self._empty, self._slot_count, self._mesh)
            self._slots = step_functions.beside(self._params, slots)
            self._cache = step_functions.make_cache(self._params, self._config, pages, size)

    @property
    def is_idle(self) -> bool:
        """Whether no request is there."""
        return not (self._queue or self._running or self._prefill)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return self._slot_count - len(self._free_slots())

    @property
    def slots(self) -> int:
        return self._slot_count

    @property
    def drafts(self) -> DraftCounts:
        """Of speculative decoding, how many were checked and accepted so far."""
        return self._speculation.counts

    def submit(self, request: Request, is_urgent: bool = False, turn: Turn = ALONE) -> int:
        """Takes a request; `step` gives its tokens.

        Args:
          is_urgent: goes before all that wait.
          turn: on whose turn it goes; in the order of submission where all have the same.

        Returns:
          Its id.

        Raises:
          As `check`.
        """
        self.check(request)
        request_id = self._request_count
        self._request_count += 1
        self._queue.add(request_id, request, turn, is_urgent)
        return request_id

    def check(self, request: Request) -> None:
        """Whether `submit` takes a request; from any thread.

        Raises:
          PromptError: the prompt leaves no room for an answer, or is no tokens, or an end token
            is none.
          SamplingError: a seed out of range, or more banned sequences than there is room for.
        """
        check_prompt(request.prompt, self._config, self.max_length)
        if request.max_tokens is not None and request.max_tokens < 1:
            raise PromptError(f"max_tokens={request.max_tokens}: at least 1")
        SETTINGS["seed"].checked("seed", request.seed)
        check_end_tokens(request.end_tokens or (), self._config)
        check_sampling(request.sampling, self._config.vocab_size)

    def cancel(self, request_id: int) -> None:
        """Ends a request wherever it is; its slot is free for the next step."""
        self._queue.drop(request_id)
        if self._prefill is not None:
            self._prefill.cancelled.add(request_id)
        for slot, running in list(self._running.items()):
            if running.admitted.request_id == request_id:
                with on_mesh(self._mesh):
                    self._slots = release(self._slots, np.int32(slot))
                self._leave(slot)

    def step(self) -> list[Token]:
        """Prefills what may enter, then gives every running request a token, or several."""
        with on_mesh(self._mesh):
            self._prefill_some()
            if not self._running:
                if self._unchecked:
                    self._clear_failed()
                return []
            width = next(w for w in self._step_widths if w >= len(self._running))
            numbers = sorted([*self._running, *self._free_slots(), *self._entering()][:width])
            rooms = {slot: running.remaining - 1 for slot, running in self._running.items()}
            run = functools.partial(self._run_idle_step, numbers)
            drafts = self._speculation.propose(numbers, rooms, run)
            emitted = jax.device_get(self._run_step(numbers, drafts))
            if emitted.failures.any() or self._unchecked:
                self._clear_failed()
        self._speculation.take(numbers, drafts, emitted.tokens)
        given = [(row, new) for row, new in np.argwhere(emitted.tokens >= 0).tolist()]
        return [self._take_token(numbers[at[0]], emitted, at) for at in given]

    def _run_step(self, numbers: Sequence[int], drafts: np.ndarray | None = None) -> Emitted:
        rows = None if len(numbers) == self._slot_count else np.array(numbers, np.int32)
        emitted, self._slots, self._cache = step_functions.step(
            self._params, self._config, self._slots, self._cache, self._pages_a_layer, rows, drafts
        )
        return emitted

    def _run_idle_step(self, numbers: Sequence[int], drafts: np.ndarray | None) -> None:
        """Runs a step to its end that changes no slot."""
        active = self._slots.is_active
        self._slots = dataclasses.replace(self._slots, is_active=active & False)
        jax.block_until_ready(self._run_step(numbers, drafts))
        self._slots = dataclasses.replace(self._slots, is_active=active)

    def _clear_failed(self) -> None:
        self._cache = step_functions.clear_failed(self._cache)
        while self._unchecked:
            self._pool.free(self._unchecked.pop())

    def _take_token(self, slot: int, emitted: Emitted, at: tuple[int, int]) -> Token:
        running = self._running[slot]
        token = running.next_token(emitted, at)
        if token.finish_reason is None:
            self._running[slot] = dataclasses.replace(running, remaining=running.remaining - 1)
        else:
            self._leave(slot)
        return token

    def _leave(self, slot: int) -> None:
        running = self._running.pop(slot)
        self._pool.free(running.admitted.allocation)
        self._queue.drop(running.admitted.request_id)

    def _entering(self) -> list[int]:
        return [] if self._prefill is None else [one.slot for one in self._prefill.admitted]

    def _free_slots(self) -> list[int]:
        taken = {*self._running, *self._entering()}
        return [slot for slot in range(self._slot_count) if slot not in taken]

    def _prefill_some(self) -> None:
        """Runs batches through layers, as many as the budget allows."""
        layers = self._config.num_layers
        budget = math.inf
        if self._running and self._settings.prefill_budget is not None:
            budget = self._settings.prefill_budget * layers
        while budget > 0 and (self._prefill is not None or self._begin_prefill()):
            prefill = self._prefill
            assert prefill is not None
            width = prefill.batch.tokens.shape[1]
            remaining = layers - prefill.layers_done
            affordable = remaining if budget == math.inf else max(1, int(budget) // width)
            count = min(remaining, affordable)
            self._run_layers(prefill, count)
            budget -= count * width
            if prefill.layers_done == layers:
                self._enter(prefill)
                self._prefill = None

    def _begin_prefill(self) -> bool:
        """Forms a batch of requests that wait, by their turns; whether there is one."""
        admitted: list[Admitted] = []
        free, used = self._free_slots(), [0] * self._shards
        while self._queue and free:
            request_id, request = self._queue.peek()
            count = prefill_length(request.prompt)
            room = self._settings.prefill_width if admitted else max(count, 1)
            end = self._end(request)
            possible = [
                slot
                for slot in free
                if self._pool.can_allocate(self._shard(slot), end)
                and used[self._shard(slot)] + count <= max(room, self._settings.prefill_width)
            ]
            if not possible:
                break
            # The shard with the fewest tokens, so that rows fill evenly.
            slot = min(possible, key=lambda slot: used[self._shard(slot)])
            shard = self._shard(slot)
            allocation = self._pool.allocate(shard, end)
            admitted.append(Admitted(request_id, request, slot, allocation, end))
            self._queue.take(request_id)
            free.remove(slot)
            used[shard] += count
        if admitted:
            self._prefill = Prefill(admitted, self._batch(admitted, prefill_width(max(used))))
        return bool(admitted)

    def _shard(self, slot: int) -> int:
        return slot * self._shards // self._slot_count

    def _end(self, request: Request) -> int:
        max_tokens = self.max_length if request.max_tokens is None else request.max_tokens
        return min(self.max_length, len(request.prompt) + max_tokens)

    def _batch(self, admitted: Sequence[Admitted], width: int) -> PrefillBatch:
        return make_prefill_batch(
            [(one.request.prompt, one.allocation) for one in admitted],
            self._shards,
            width,
            self._settings.page_size,
            self._pages_a_layer,
            self.special.sop,
        )

    def _run_layers(self, prefill: Prefill, count: int) -> None:
        params, config, batch = self._params, self._config, prefill.batch
        if prefill.x is None:
            prefill.x = step_functions.embed(params, config, batch)
        first, end = prefill.layers_done, prefill.layers_done + count
        prefill.x, self._cache = step_functions.prefill(
            params, config, prefill.x, batch, self._cache, first, end
        )
        prefill.layers_done = end

    def _enter(self, prefill: Prefill) -> None:
        """Puts the requests of a prefilled batch into their slots."""
        for admitted in prefill.admitted:
            if admitted.request_id in prefill.cancelled:
                self._unchecked.append(admitted.allocation)
                continue
            request, slot = admitted.request, admitted.slot
            ends = self.special.end_tokens if request.end_tokens is None else request.end_tokens
            pages = admitted.allocation.pages
            row = request_row(self._empty, request, pages, admitted.end, self.special)
            self._slots = admit(self._slots, np.int32(slot), row)
            remaining = admitted.end - len(request.prompt)
            self._running[slot] = Running(admitted, frozenset(ends), remaining)
            self._speculation.begin(slot, request.prompt, self.special.sop)

    def warm_up(self) -> None:
        """Compiles all programs that requests of any kind will need."""
        longest = max(self._settings.prefill_width, self.max_length)
        with on_mesh(self._mesh):
            for width in prefill_widths(longest):
                prefill = Prefill([], self._batch([], width))
                self._run_layers(prefill, self._config.num_layers)
            self._slots = admit(self._slots, np.int32(0), self._empty)
            self._slots = release(self._slots, np.int32(0))
            for width in self._step_widths:
                self._run_step(range(width))
            idle = lambda rows, drafts: self._run_idle_step(range(rows), drafts)
            self._speculation.warm_up(self._step_widths, idle)
            self._cache = step_functions.clear_failed(self._cache)
