"""Continuous batching: requests enter and leave a running batch one by one.

A request waits until a slot and pages for all of its tokens are free. Prompts are prefilled in
packs; then each step gives one token to every request. Shapes never depend on requests, so
that `warm_up` compiles all there is to compile.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine import step_functions
from glm_jax.engine.fair_queue import ALONE, Turn, Turns
from glm_jax.engine.generation_settings import SETTINGS
from glm_jax.engine.page_pool import PAGE_SIZE, Lease, PagePool, cache_pages, table_size
from glm_jax.engine.prefill_batch import Entry, pack_prompts, pack_width, prefilled, widths
from glm_jax.engine.prompt import PromptError, check_end_tokens, check_prompt
from glm_jax.engine.request import Completion, Request, Token, completion
from glm_jax.engine.slots import (
    FAILURES,
    Emitted,
    admit,
    check_sampling,
    empty_slot,
    empty_slots,
    release,
    request_row,
)
from glm_jax.engine.step_functions import Pack
from glm_jax.model.device_layout import prepare
from glm_jax.model.paged_cache import init_paged_cache
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
    """

    slots: int = 16
    max_length: int | None = None
    cache_tokens: int | None = None
    page_size: int = PAGE_SIZE
    prefill_width: int = 512
    prefill_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "cache_tokens", "page_size", "prefill_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PromptError(f"{name}={value}: at least 1")
        if self.prefill_budget is not None and self.prefill_budget < 1:
            raise PromptError(f"prefill_budget={self.prefill_budget}: at least 1")


@dataclasses.dataclass(frozen=True)
class _Running:
    """A request in a slot, how many tokens it may still get, and how many it has."""

    ticket: int
    lease: Lease
    left: int
    end_tokens: frozenset[int]
    alternatives: bool
    given: int = 0


@dataclasses.dataclass
class _Prefill:
    """A pack on its way through the layers."""

    entries: list[Entry]
    pack: Pack
    x: Any = None
    layers_done: int = 0
    cancelled: set[int] = dataclasses.field(default_factory=set)


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
    ):
        """Makes pages and slots on the mesh that the parameters lie on.

        Raises:
          PromptError: special tokens that are unknown or not in the vocabulary, or a max_length
            past the model's positions.
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
        self._is_unrolled = isinstance(self._params.layers, tuple)
        self._slot_count = -(-settings.slots // self._shards) * self._shards
        self._step_widths = self._widths_of_steps()
        self._make_state()
        self._tickets = 0
        self._queue: Turns[Request] = Turns()
        self._running: dict[int, _Running] = {}  # by slot
        self._prefill: _Prefill | None = None
        self._unchecked: list[Lease] = []  # pages whose contents no step has looked at

    def _widths_of_steps(self) -> list[int]:
        """Slots that a step may run: only a CPU saves by rows what more programs cost."""
        device, *_ = jax.tree.leaves(self._params)[0].devices()
        is_one_cpu = self._is_unrolled and self._mesh is None and device.platform == "cpu"
        halves = range((self._slot_count - 1).bit_length() if is_one_cpu else 0)
        return [*(1 << i for i in halves), self._slot_count]

    def _make_state(self) -> None:
        size, longest = self._settings.page_size, self.max_length
        typical = -(-min(longest, _TYPICAL_LENGTH) // size) * size  # whole pages
        tokens = self._settings.cache_tokens or self._slot_count * typical
        pages = cache_pages(tokens, longest, self._shards, size)
        self._pool = PagePool(self._shards, pages, size)
        self._pages_a_layer = 0 if self._is_unrolled else pages
        self._empty = empty_slot(self._config, longest, table_size(longest, size))
        with on_mesh(self._mesh):
            slots = empty_slots(self._empty, self._slot_count, self._mesh)
            cache = init_paged_cache(self._config, pages, size, self._is_unrolled, self._mesh)
        if self._mesh is None:  # at a place that is named, as all steps will leave them
            [device] = jax.tree.leaves(self._params)[0].devices()
            slots, cache = jax.device_put((slots, cache), device)
        self._slots, self._cache = slots, cache

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

    def submit(self, request: Request, is_urgent: bool = False, turn: Turn = ALONE) -> int:
        """Takes a request; `step` gives its tokens.

        Args:
          is_urgent: goes before all that wait.
          turn: on whose turn it goes; in the order of submission where all have the same.

        Returns:
          Its ticket.

        Raises:
          As `check`.
        """
        self.check(request)
        ticket = self._tickets
        self._tickets += 1
        self._queue.add(ticket, request, turn, is_urgent)
        return ticket

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

    def cancel(self, ticket: int) -> None:
        """Ends a request wherever it is; its slot is free for the next step."""
        self._queue.drop(ticket)
        if self._prefill is not None:
            self._prefill.cancelled.add(ticket)
        for slot, running in list(self._running.items()):
            if running.ticket == ticket:
                with on_mesh(self._mesh):
                    self._slots = release(self._slots, np.int32(slot))
                self._leave(slot)

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completes requests, which are taken as slots become free, in the order in which
        they finish. Tickets count from the first on."""
        source = iter(requests)
        answers: dict[int, list[Token]] = {}
        is_exhausted = False
        while not (is_exhausted and self.is_idle):
            while not is_exhausted and self.waiting < self._slot_count:
                request = next(source, None)
                is_exhausted = request is None
                if request is not None:
                    answers[self.submit(request)] = []
            for token in self.step():
                answers[token.ticket].append(token)
                if token.finish_reason is not None:
                    yield completion(answers.pop(token.ticket))

    def step(self) -> list[Token]:
        """Prefills what may enter, then gives every running request a token."""
        with on_mesh(self._mesh):
            self._prefill_some()
            if not self._running:
                if self._unchecked:
                    self._clear_failed()
                return []
            width = next(w for w in self._step_widths if w >= len(self._running))
            numbers = [*self._running, *self._free_slots(), *self._entering()][:width]
            emitted = jax.device_get(self._run_step(numbers))
            if emitted.failures.any() or self._unchecked:
                self._clear_failed()
        given = []
        for place, (slot, running) in enumerate(list(self._running.items())):
            row = slot if width == self._slot_count else place
            given.append(self._give(slot, running, emitted, row))
        return given

    def _run_step(self, numbers: Sequence[int]) -> Emitted:
        rows = None if len(numbers) == self._slot_count else np.array(numbers, np.int32)
        emitted, self._slots, self._cache = step_functions.step(
            self._params, self._config, self._slots, self._cache, self._pages_a_layer, rows
        )
        return emitted

    def _clear_failed(self) -> None:
        self._cache = step_functions.clear_failed(self._cache)
        while self._unchecked:
            self._pool.give_back(self._unchecked.pop())

    def _give(self, slot: int, running: _Running, emitted: Emitted, row: int) -> Token:
        token, reason, error = int(emitted.tokens[row]), None, None
        if failure := int(emitted.failures[row]):
            reason, error = "error", FAILURES[failure](running.given)
        elif token in running.end_tokens:
            reason = "stop"
        elif running.left == 1:
            reason = "length"
        if reason is None:
            given = running.given + 1
            self._running[slot] = dataclasses.replace(running, given=given, left=running.left - 1)
        else:
            self._leave(slot)
        some: tuple[tuple[int, float], ...] = ()
        if running.alternatives:
            told = emitted.alternatives[row], emitted.alternative_log_probabilities[row]
            some = tuple(zip(*(x.tolist() for x in told), strict=True))
        log_probability = float(emitted.log_probabilities[row])
        return Token(running.ticket, token, log_probability, reason, some, error)

    def _leave(self, slot: int) -> None:
        running = self._running.pop(slot)
        self._pool.give_back(running.lease)
        self._queue.drop(running.ticket)

    def _entering(self) -> list[int]:
        return [] if self._prefill is None else [entry.slot for entry in self._prefill.entries]

    def _free_slots(self) -> list[int]:
        taken = {*self._running, *self._entering()}
        return [slot for slot in range(self._slot_count) if slot not in taken]

    def _prefill_some(self) -> None:
        """Runs packs through layers, as many as the budget allows."""
        layers = self._config.num_layers
        budget = math.inf
        if self._running and self._settings.prefill_budget is not None:
            budget = self._settings.prefill_budget * layers
        while budget > 0 and (self._prefill is not None or self._begin_prefill()):
            prefill = self._prefill
            assert prefill is not None
            width = prefill.pack.tokens.shape[1]
            left = layers - prefill.layers_done
            count = left if budget == math.inf else max(1, min(left, int(budget) // width))
            self._run_layers(prefill, count)
            budget -= count * width
            if prefill.layers_done == layers:
                self._enter(prefill)
                self._prefill = None

    def _begin_prefill(self) -> bool:
        """Forms a pack of requests that wait, by their turns; whether there is one."""
        entries: list[Entry] = []
        free, used = self._free_slots(), [0] * self._shards
        while self._queue and free:
            ticket, request = self._queue.peek()
            count = prefilled(request.prompt)
            room = self._settings.prefill_width if entries else max(count, 1)
            end = self._end(request)
            possible = [
                slot
                for slot in free
                if self._pool.can_take(self._shard(slot), end)
                and used[self._shard(slot)] + count <= max(room, self._settings.prefill_width)
            ]
            if not possible:
                break
            # Where least is packed, so that rows fill evenly.
            slot = min(possible, key=lambda slot: used[self._shard(slot)])
            shard = self._shard(slot)
            entries.append(Entry(ticket, request, slot, self._pool.take(shard, end), end))
            self._queue.take(ticket)
            free.remove(slot)
            used[shard] += count
        if entries:
            self._prefill = _Prefill(entries, self._pack(entries, pack_width(max(used))))
        return bool(entries)

    def _shard(self, slot: int) -> int:
        return slot * self._shards // self._slot_count

    def _end(self, request: Request) -> int:
        most = self.max_length if request.max_tokens is None else request.max_tokens
        return min(self.max_length, len(request.prompt) + most)

    def _pack(self, entries: list[Entry], width: int) -> Pack:
        return pack_prompts(
            entries,
            self._shards,
            width,
            self._settings.page_size,
            self._pages_a_layer,
            self.special.sop,
        )

    def _run_layers(self, prefill: _Prefill, count: int) -> None:
        if prefill.x is None:
            prefill.x = step_functions.embed(self._params, self._config, prefill.pack)
        run = functools.partial(
            step_functions.prefill_layers, config=self._config, pack=prefill.pack
        )
        first, end = prefill.layers_done, prefill.layers_done + count
        layers: Any = self._params.layers
        if not self._is_unrolled:
            bounds = {"first": np.int32(first), "end": np.int32(end)}
            prefill.x, self._cache = run(layers, x=prefill.x, cache=self._cache, **bounds)
        else:  # one layer is one program: it is compiled once for all of them
            caches: Any = self._cache
            cache = list(caches)
            for i in range(first, end):
                prefill.x, [cache[i]] = run(
                    (layers[i],), x=prefill.x, cache=(cache[i],), first=0, end=1
                )
            self._cache = tuple(cache)
        prefill.layers_done = end

    def _enter(self, prefill: _Prefill) -> None:
        """Puts the requests of a prefilled pack into their slots."""
        for entry in prefill.entries:
            if entry.ticket in prefill.cancelled:
                self._unchecked.append(entry.lease)
                continue
            ends = entry.request.end_tokens
            ends = self.special.end_tokens if ends is None else ends
            pages, sop = entry.lease.pages, self.special.sop
            row = request_row(self._empty, entry.request, pages, entry.end, ends, sop)
            self._slots = admit(self._slots, np.int32(entry.slot), row)
            left = entry.end - len(entry.request.prompt)
            self._running[entry.slot] = _Running(
                entry.ticket, entry.lease, left, frozenset(ends), entry.request.alternatives
            )

    def warm_up(self) -> None:
        """Compiles all programs that requests of any kind will need."""
        longest = max(self._settings.prefill_width, self.max_length)
        with on_mesh(self._mesh):
            for width in widths(longest):
                prefill = _Prefill([], self._pack([], width))
                self._run_layers(prefill, self._config.num_layers)
            self._slots = admit(self._slots, np.int32(0), self._empty)
            self._slots = release(self._slots, np.int32(0))
            for width in self._step_widths:
                self._run_step(range(width))
            self._cache = step_functions.clear_failed(self._cache)
