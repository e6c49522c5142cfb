"""Continuous batching: requests enter and leave a running batch one by one.

The life of a request: `submit` checks it and puts it into the queue. When its turn has come, and a
slot and pages for its prompt are free, it is admitted (`scheduler`): it gets both, and its prompt
joins a prefill batch, unless another request has the same prompt in pages, which it then shares.
The batch runs through the layers, as many between two steps as the prefill budget allows. Then the
request has a row in its slot, and each step gives it a token, or several by drafts (`speculation`),
until an end token, its length, a failure or `cancel` ends it, which frees both. Its pages grow with
its answer; when there are none left the request that goes last is preempted: it waits again, and
goes on from its answer so far as if it had never stopped.

What always holds:
- A request is in one place: in the queue, in the one prefill batch, or in a slot.
- Before a step it has pages for all that the step may write, and no other has those.
- What a step gave is known one step later where the device runs one ahead (`steps_in_flight`).
- A slot without a request is inactive on the device: it writes to page 0, which no one reads.
- A request's failure reaches no other: what it left in its pages is cleared before others have
  them.
- Shapes never depend on requests, so that `warm_up` compiles all there is to compile.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine import step_functions
from glm_jax.engine.draft_model import DraftModel, SmallModel
from glm_jax.engine.engine_settings import EngineSettings
from glm_jax.engine.fair_queue import ALONE, Turn
from glm_jax.engine.guidance import Guidance
from glm_jax.engine.page_pool import PageAllocation, page_table, table_size
from glm_jax.engine.prefill_batch import (
    PrefillBatch,
    fitting_width,
    make_prefill_batch,
    prefill_widths,
)
from glm_jax.engine.prompt import PromptError, check_end_tokens
from glm_jax.engine.request import Request, Token
from glm_jax.engine.request_checks import check_request
from glm_jax.engine.request_state import Admission, Admitted, Prefill
from glm_jax.engine.scheduler import (
    Scheduler,
    SchedulingCounts,
    no_copies,
    page_copies,
    scheduler_limits,
)
from glm_jax.engine.slots import (
    Emitted,
    admit,
    empty_slot,
    empty_slots,
    release,
    request_row,
    set_table,
)
from glm_jax.engine.speculation import DraftCounts, Speculation
from glm_jax.engine.steps_in_flight import (
    StepInFlight,
    StepsInFlight,
    in_next_step,
    max_in_flight,
    step_widths,
)
from glm_jax.model.adapters import adapter_count
from glm_jax.model.device_layout import prepare
from glm_jax.model.layer_stacks import as_layers
from glm_jax.model.params import GLMParams
from glm_jax.sharding import mesh_of, on_mesh, row_shards

__all__ = ["Engine", "EngineSettings"]


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
        """Make pages and slots on the mesh that the parameters lie on.

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
        self.max_length = settings.longest(config)
        self._config, self._settings, self._mesh = config, settings, mesh_of(params)
        self._params = prepare(params)
        self._adapter_count, self._shards = adapter_count(params), row_shards(self._mesh)
        self._is_unrolled = as_layers(self._params.layers).is_apart
        self._slot_count = -(-settings.slots // self._shards) * self._shards
        device, *_ = jax.tree.leaves(self._params)[0].devices()
        is_one_cpu = self._is_unrolled and self._mesh is None and device.platform == "cpu"
        self._step_widths = step_widths(self._slot_count, is_one_cpu)
        self._in_flight, self._max_in_flight = StepsInFlight(), max_in_flight(device.platform)
        self._make_state()
        self._request_count = 0
        self._prefill: Prefill | None = None
        self._unchecked: list[PageAllocation] = []  # pages whose contents no step has looked at
        count, draft_model = settings.speculate, None
        if small_model is not None and count:
            small_model.check(config, self.max_length)
            size = self._slot_count, self.max_length
            draft_model = DraftModel(small_model, special.sop, *size, count)
        self._speculation = Speculation(count, self._mesh, draft_model)
        self._guidance = Guidance(config.vocab_size)

    def _make_state(self) -> None:
        longest, size = self.max_length, self._settings.page_size
        limits = scheduler_limits(self._settings, self._config, self._shards, self._slot_count)
        pages = limits.pages
        self._scheduler = Scheduler(limits)
        self._pages_a_layer = 0 if self._is_unrolled else pages
        self._empty = empty_slot(self._config, longest, table_size(longest, size))
        with on_mesh(self._mesh):
            slots = empty_slots(self._empty, self._slot_count, self._mesh)
            self._slots = step_functions.beside(self._params, slots)
            self._cache = step_functions.make_cache(self._params, self._config, pages, size)

    @property
    def is_idle(self) -> bool:
        """Whether no request is there."""
        return self._scheduler.is_idle and not self._prefill

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._scheduler.queue)

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return self._slot_count - len(self._scheduler.free_slots())

    @property
    def slots(self) -> int:
        return self._slot_count

    @property
    def drafts(self) -> DraftCounts:
        """Of speculative decoding, how many were checked and accepted so far."""
        return self._speculation.counts

    @property
    def scheduling(self) -> SchedulingCounts:
        """How often requests were preempted, or shared another one's prompt, so far."""
        return self._scheduler.counts

    def submit(self, request: Request, is_urgent: bool = False, turn: Turn = ALONE) -> int:
        """Take a request; `step` gives its tokens.

        Args:
          is_urgent: goes before all of its priority that wait.
          turn: on whose turn it goes; in the order of submission where all have the same.

        Returns:
          Its id.

        Raises:
          As `check`.
        """
        self.check(request)
        request_id = self._request_count
        self._request_count += 1
        self._scheduler.add(request_id, request, turn, is_urgent)
        return request_id

    def check(self, request: Request) -> None:
        """Whether `submit` takes a request; from any thread. Raises: as `check_request`."""
        check_request(request, self._config, self.max_length, self._adapter_count)

    def cancel(self, request_id: int) -> None:
        """End a request wherever it is; its slot is free for the next step."""
        self._scheduler.queue.drop(request_id)
        if self._prefill is not None:
            self._prefill.cancelled.add(request_id)
        for slot, running in list(self._scheduler.running.items()):
            if running.admitted.request_id == request_id:
                with on_mesh(self._mesh):
                    self._slots = release(self._slots, np.int32(slot))
                pages = self._scheduler.leave(slot)
                if not self._in_flight.defer(pages):
                    self._scheduler.pool.free(pages)
                self._guidance.end(slot)

    def step(self) -> list[Token]:
        """Prefills what may enter, then gives every running request a token, or several."""
        with on_mesh(self._mesh):
            self._prefill_some()
            if self._unchecked:  # before anyone is preempted for want of these pages
                self._clear_failed()
            if self._in_flight and not self._in_flight.is_first_for(self._scheduler.running):
                self._read_step()
            while self._may_start_step():
                self._start_step()
            return self._read_step() if self._in_flight else []

    def _may_start_step(self) -> bool:
        running, count = self._scheduler.running, len(self._in_flight)
        if not count:
            return bool(running)
        # Drafts and masks are made of all tokens before them, and so is a request that waits again.
        needs_tokens = self._settings.speculate or self._guidance.has_answers
        return (
            count < self._max_in_flight
            and not needs_tokens
            and self._scheduler.can_grow()
            and bool(in_next_step(running))
        )

    def _start_step(self) -> None:
        scheduler = self._scheduler
        self._grow()
        if not scheduler.running:
            return
        width = next(w for w in self._step_widths if w >= len(scheduler.running))
        order = [*scheduler.running, *scheduler.free_slots(), *scheduler.entering]
        numbers = sorted(order[:width])
        run = functools.partial(self._run_idle_step, numbers)
        drafts = self._speculation.propose(numbers, scheduler.draft_rooms, run)
        masks = self._guidance.making(numbers, drafts)
        emitted = self._run_step(numbers, drafts, masks)
        requests = in_next_step(scheduler.running)
        self._in_flight.start(StepInFlight(numbers, drafts, emitted, requests))

    def _read_step(self) -> list[Token]:
        step, emitted = self._in_flight.read()
        if emitted.failures.any():
            self._clear_failed()
        for pages in step.pages:
            self._scheduler.pool.free(pages)
        self._speculation.take(step.numbers, step.drafts, emitted.tokens)
        given = step.given(emitted, self._scheduler.running)
        return [self._take_token(step.numbers[at[0]], emitted, at) for at in given]

    def _grow(self) -> None:
        """Give requests pages for the next step's tokens."""
        preempted, grown = self._scheduler.grow()
        for slot in preempted:
            self._slots = release(self._slots, np.int32(slot))
            self._guidance.end(slot)
        for slot, pages in grown.items():
            table = page_table(pages, len(self._empty.table))
            self._slots = set_table(self._slots, np.int32(slot), table)

    def _run_step(
        self,
        numbers: Sequence[int],
        drafts: np.ndarray | None = None,
        masks: Callable[[], np.ndarray] | None = None,
    ) -> Emitted:
        rows = None if len(numbers) == self._slot_count else np.array(numbers, np.int32)
        model, state = (self._params, self._config), (self._slots, self._cache)
        emitted, self._slots, self._cache = step_functions.run_step(
            *model, *state, self._pages_a_layer, rows, drafts, masks
        )
        return emitted

    def _run_idle_step(self, numbers: Sequence[int], drafts: np.ndarray | None) -> None:
        """Run a step to its end that changes no slot."""
        active = self._slots.is_active
        self._slots = dataclasses.replace(self._slots, is_active=active & False)
        jax.block_until_ready(self._run_step(numbers, drafts))
        self._slots = dataclasses.replace(self._slots, is_active=active)

    def _clear_failed(self) -> None:
        self._cache = step_functions.clear_failed(self._cache)
        while self._unchecked:
            self._scheduler.pool.free(self._unchecked.pop())

    def _take_token(self, slot: int, emitted: Emitted, at: tuple[int, int]) -> Token:
        running = self._scheduler.running[slot]
        token = self._guidance.take(slot, running.next_token(emitted, at))
        if token.finish_reason is None:
            running.answer.append(token.token)
        else:
            # Its slot is inactive on the device: steps under way do not write to its pages.
            self._scheduler.pool.free(self._scheduler.leave(slot))
            self._guidance.end(slot)
        return token

    def _prefill_some(self) -> None:
        """Run batches through layers, as many as the budget allows."""
        layers = self._config.num_layers
        budget = math.inf
        if self._scheduler.running and self._settings.prefill_budget is not None:
            budget = float(self._settings.prefill_budget * layers)
        while budget > 0 and (self._prefill is not None or self._begin_prefill()):
            prefill = self._prefill
            assert prefill is not None
            count = prefill.layers_within(budget, layers)
            self._run_layers(prefill, count)
            budget -= count * prefill.batch.tokens.shape[1]
            if prefill.layers_done == layers:
                self._enter_all(prefill)
                self._prefill = None

    def _begin_prefill(self) -> bool:
        """Admits requests, and forms a batch of those to prefill; whether there is one."""
        admission = self._scheduler.admit()
        self._copy_pages(admission.ready)
        for admitted in admission.ready:
            self._enter(admitted)
        if admission.prefilled:
            self._prefill = Prefill(admission, self._batch(admission.prefilled))
        return bool(admission.prefilled)

    def _copy_pages(self, followers: Sequence[Admitted]) -> None:
        for copies in page_copies(followers, self._shards):
            self._run_copies(*copies.T)

    def _run_copies(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self._cache = step_functions.copy_pages(self._cache, sources, targets, self._pages_a_layer)

    def _batch(self, admitted: Sequence[Admitted], width: int = 0) -> PrefillBatch:
        texts = [(one.text, one.allocation) for one in admitted]
        return make_prefill_batch(
            texts,
            self._shards,
            fitting_width(texts, self._shards, width),
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

    def _enter_all(self, prefill: Prefill) -> None:
        """Put the requests of a prefilled batch into their slots."""
        self._copy_pages(prefill.admission.followers)
        for one in prefill.admitted:
            if one.request_id not in prefill.cancelled:
                self._enter(one)
            else:
                self._unchecked.append(self._scheduler.give_up(one))

    def _enter(self, admitted: Admitted) -> None:
        request, special = admitted.request, self.special
        ends = special.end_tokens if request.end_tokens is None else request.end_tokens
        text, pages = admitted.text, admitted.allocation.pages
        row = request_row(self._empty, request, text, pages, admitted.end, special)
        self._slots = admit(self._slots, np.int32(admitted.slot), row)
        self._scheduler.enter(admitted, frozenset(ends))
        self._speculation.begin(admitted.slot, text, special.sop)
        self._guidance.begin(admitted.slot, request, ends, admitted.answer)

    def warm_up(self) -> None:
        """Compiles all programs that requests of any kind will need."""
        longest = max(self._settings.prefill_width, self.max_length)
        with on_mesh(self._mesh):
            for width in prefill_widths(longest):
                prefill = Prefill(Admission([], [], []), self._batch([], width))
                self._run_layers(prefill, self._config.num_layers)
            self._slots = admit(self._slots, np.int32(0), self._empty)
            self._slots = set_table(self._slots, np.int32(0), self._empty.table)
            self._slots = release(self._slots, np.int32(0))
            self._run_copies(*no_copies(self._shards).T)
            for width in self._step_widths:
                self._run_step(range(width))
                guided = self._speculation.shapes(width) if self._settings.compiles_guided else ()
                for drafts in guided:
                    masks = functools.partial(self._guidance.masks, range(width), drafts)
                    self._run_step(range(width), drafts, masks)
            idle = lambda rows, drafts: self._run_idle_step(range(rows), drafts)
            self._speculation.warm_up(self._step_widths, idle)
            self._cache = step_functions.clear_failed(self._cache)
