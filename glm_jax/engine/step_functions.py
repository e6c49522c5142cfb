"""The programs that run on the paged cache: a prefill, layers at a time, and a decode step.

A prefill puts keys and values of prompts into pages and computes no scores: a prompt's last token
(sop, or the last of a prefix) is left to the step, which sees all before it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from glm_jax import compiler_settings
from glm_jax.config import GLMConfig
from glm_jax.engine.choosing import choose, choose_checked
from glm_jax.engine.prefill_batch import PrefillBatch
from glm_jax.engine.slots import Emitted, Slots, put_back
from glm_jax.model import glm, paged_cache
from glm_jax.model.layer_stacks import as_layers
from glm_jax.model.layers import rotary_factors
from glm_jax.model.paged_cache import PagedKVCache, Paging, init_paged_cache
from glm_jax.model.params import GLMParams
from glm_jax.model.visibility import Visibility
from glm_jax.sharding import mesh_of

# Compiles a decode step. Whatever step is compiled by it, no other program may call.
jit_step = functools.partial(jax.jit, compiler_options=compiler_settings.of_decoding())


@struct.dataclass
class Rows:
    """One or more new tokens of each of several sequences, to be run.

    Attributes:
      is_active: whether there is a token; the others, at the end of a row, change nothing.
      tokens: whose keys and values are not in the cache yet; each sees those before it.
      position_ids: of the tokens.
      index: of each row's first token in its sequence.
      table: pages of the sequence in order.
      adapter_id: of the sequence, see `Prompt.adapter`; None for no adapter.
    """

    is_active: Bool[Any, "rows new"]
    tokens: Int[Any, "rows new"]
    position_ids: Int[Any, "rows new"]
    index: Int[Any, " rows"]
    table: Int[Any, "rows table_size"]
    adapter_id: Int[Any, " rows"] | None = None


def make_cache(params: GLMParams, config: GLMConfig, pages: int, page_size: int) -> PagedKVCache:
    """Return an empty cache where parameters are.

    Args:
      params: prepared.
      pages: of each device and layer.
    """
    mesh = mesh_of(params)
    is_apart = as_layers(params.layers).is_apart
    cache = init_paged_cache(config, pages, page_size, is_apart, mesh)
    return beside(params, cache)


def beside(params: GLMParams, tree: Any) -> Any:
    """Arrays committed to the one device that parameters are on, as all steps will leave them.
    Those on a mesh are left as they are."""
    if mesh_of(params) is not None:
        return tree
    [device] = jax.tree.leaves(params)[0].devices()
    return jax.device_put(tree, device)


@functools.partial(jax.jit, static_argnames="config")
def embed(
    params: GLMParams, config: GLMConfig, batch: PrefillBatch
) -> Float[Array, "rows seq embed"]:
    """Return what the first block takes."""
    return glm.embed_tokens(params, config, jnp.asarray(batch.tokens))


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("x", "cache"))
def prefill_layers(
    layers: Any,
    config: GLMConfig,
    x: Float[Array, "rows seq embed"],
    batch: PrefillBatch,
    cache: PagedKVCache,
    first: int | Int[Any, ""],
    end: int | Int[Any, ""],
) -> tuple[Float[Array, "rows seq embed"], PagedKVCache]:
    """Run a batch through some blocks.

    Args:
      layers: stacked, of which those from `first` to `end` run; or a tuple of them that all
        run, with the pages of each in `cache`.
    """
    rotary = rotary_factors(config, batch.position_ids)
    ranges = batch.visibility.key_ranges
    bounds = None if as_layers(layers).is_apart else (first, end)
    ids = jnp.asarray(batch.adapter_ids)
    return glm.run_layers(layers, config, x, rotary, ranges, cache, batch.paging, bounds, ids)


def prefill(
    params: GLMParams,
    config: GLMConfig,
    x: Float[Array, "rows seq embed"],
    batch: PrefillBatch,
    cache: PagedKVCache,
    first: int,
    end: int,
) -> tuple[Float[Array, "rows seq embed"], PagedKVCache]:
    """Run a batch through the blocks from `first` to `end` (exclusive), in one program; or in
    one a layer where layers are apart, so that it is compiled once for all of them."""
    if not as_layers(params.layers).is_apart:
        return prefill_layers(*prefill_arguments(params, config, x, batch, cache, first, end))
    assert isinstance(cache, tuple)
    caches = list(cache)
    for i in range(first, end):
        arguments = prefill_arguments(params, config, x, batch, caches, i, end)
        x, [caches[i]] = prefill_layers(*arguments)
    return x, tuple(caches)


def prefill_arguments(
    params: GLMParams,
    config: GLMConfig,
    x: Float[Array, "rows seq embed"],
    batch: PrefillBatch,
    cache: Any,
    first: int,
    end: int,
) -> tuple[Any, ...]:
    """Return what the first run of `prefill_layers` by `prefill` takes."""
    if as_layers(params.layers).is_apart:
        return (params.layers[first],), config, x, batch, (cache[first],), 0, 1
    return params.layers, config, x, batch, cache, np.int32(first), np.int32(end)


@functools.partial(
    jit_step, static_argnames=("config", "pages_a_layer"), donate_argnames=("slots", "cache")
)
def step(
    params: GLMParams,
    config: GLMConfig,
    slots: Slots,
    cache: PagedKVCache,
    pages_a_layer: int,
    numbers: Int[Any, " rows"] | None = None,
    drafts: Int[Any, "rows drafts"] | None = None,
) -> tuple[Emitted, Slots, PagedKVCache]:
    """Return the next token of every active slot, and those after it that are its drafts.

    Args:
      pages_a_layer: of a device where layers share an array, else 0.
      numbers: of the slots that run, each once, every active one among them; None runs all.
      drafts: tokens that may come next in each slot that runs, -1 after the last; None for none.
        A slot has room for all of its own and one more.

    Returns:
      What it gives those that ran; then slots and pages.
    """
    rows = _rows(_numbered(slots, numbers), drafts)
    logits, cache = forward_rows(params, config, rows, cache, pages_a_layer)
    return *_choose(logits, slots, numbers, drafts, None), cache


@functools.partial(jit_step, static_argnames=("config", "pages_a_layer"), donate_argnames="cache")
def begin_step(
    params: GLMParams,
    config: GLMConfig,
    slots: Slots,
    cache: PagedKVCache,
    pages_a_layer: int,
    numbers: Int[Any, " rows"] | None = None,
    drafts: Int[Any, "rows drafts"] | None = None,
) -> tuple[Float[Array, "rows new vocab"], PagedKVCache]:
    """Run the first part of a `step` that `finish_step` ends; return its logits, and pages.

    What tokens may be chosen can be found out while it runs.

    Args:
      As of `step`.
    """
    rows = _rows(_numbered(slots, numbers), drafts)
    return forward_rows(params, config, rows, cache, pages_a_layer)


@functools.partial(jit_step, donate_argnames="slots")
def finish_step(
    slots: Slots,
    logits: Float[Array, "rows new vocab"],
    allowed: UInt32[Any, "rows new words"],
    numbers: Int[Any, " rows"] | None = None,
    drafts: Int[Any, "rows drafts"] | None = None,
) -> tuple[Emitted, Slots]:
    """Return the tokens of a step that `begin_step` began.

    Args:
      allowed: what may be chosen at each position, as bits; see `sampling.keep_allowed`.
    """
    return _choose(logits, slots, numbers, drafts, jnp.asarray(allowed))


def run_step(
    params: GLMParams,
    config: GLMConfig,
    slots: Slots,
    cache: PagedKVCache,
    pages_a_layer: int,
    numbers: Int[Any, " rows"] | None,
    drafts: Int[Any, "rows drafts"] | None,
    masks: Callable[[], UInt32[np.ndarray, "rows new words"]] | None,
) -> tuple[Emitted, Slots, PagedKVCache]:
    """Return a `step`, in two programs where not all tokens may be chosen.

    Args:
      masks: returns what may be chosen at each position, as bits; called while the device runs.
        None where all tokens may.
    """
    state = params, config, slots, cache, pages_a_layer, numbers, drafts
    if masks is None:
        return step(*state)
    logits, cache = begin_step(*state)
    return *finish_step(slots, logits, masks(), numbers, drafts), cache


def _numbered(slots: Slots, numbers: Int[Any, " rows"] | None) -> Slots:
    some: Slots = slots if numbers is None else jax.tree.map(lambda x: x[numbers], slots)
    return some


def _choose(
    logits: Float[Array, "rows new vocab"],
    slots: Slots,
    numbers: Int[Any, " rows"] | None,
    drafts: Int[Any, "rows drafts"] | None,
    allowed: UInt32[Array, "rows new words"] | None,
) -> tuple[Emitted, Slots]:
    some = _numbered(slots, numbers)
    if drafts is None:
        emitted, some = choose(logits[:, 0], some, None if allowed is None else allowed[:, 0])
        emitted = jax.tree.map(lambda x: x[:, None], emitted)
    else:
        emitted, some = choose_checked(logits, jnp.asarray(drafts), some, allowed)
    return emitted, some if numbers is None else put_back(slots, numbers, some)


def _rows(slots: Slots, drafts: Int[Any, "rows drafts"] | None) -> Rows:
    """Return the tokens that a step runs: each slot's next one, and its drafts."""
    is_active, tokens = slots.is_active[:, None], slots.token[:, None]
    if drafts is not None:
        drafts = jnp.asarray(drafts)
        tokens = jnp.concatenate([tokens, jnp.maximum(drafts, 0)], axis=1)
        is_active &= jnp.pad(drafts >= 0, ((0, 0), (1, 0)), constant_values=True)
    distance = slots.position_step[:, None] * jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return Rows(
        is_active=is_active,
        tokens=tokens,
        position_ids=slots.position_id[:, None] + distance,
        index=slots.index,
        table=slots.table,
        adapter_id=slots.adapter_id,
    )


@functools.partial(jit_step, static_argnames=("config", "pages_a_layer"), donate_argnames="cache")
def decode(
    params: GLMParams, config: GLMConfig, rows: Rows, cache: PagedKVCache, pages_a_layer: int
) -> tuple[Float[Array, "rows new vocab"], PagedKVCache]:
    """Logits after each of the rows' tokens, whose keys and values join the cache.

    Args:
      pages_a_layer: of a device where layers share an array, else 0.
    """
    return forward_rows(params, config, rows, cache, pages_a_layer)


@functools.partial(jax.jit, static_argnames="pages_a_layer", donate_argnames="cache")
def copy_pages(
    cache: PagedKVCache,
    sources: Int[Any, " copies"],
    targets: Int[Any, " copies"],
    pages_a_layer: int,
) -> PagedKVCache:
    """Copy pages of every layer onto others.

    Args:
      sources, targets: see `paged_cache.copy_pages`.
      pages_a_layer: of a device where layers share an array, else 0.
    """
    return paged_cache.copy_pages(cache, jnp.asarray(sources), jnp.asarray(targets), pages_a_layer)


@functools.partial(jax.jit, donate_argnames="cache")
def clear_failed(cache: PagedKVCache) -> PagedKVCache:
    """Return the cache with 0 for what is no finite number. Pages are read whole, and NaN times the
    probability 0 of a masked position is NaN: a failed request's would fail the next to have them.
    """

    def clear(x: Array) -> Array:
        return jnp.where(jnp.isfinite(x), x, 0) if jnp.issubdtype(x.dtype, jnp.floating) else x

    cleared: PagedKVCache = jax.tree.map(clear, cache)
    return cleared


def forward_rows(
    params: GLMParams, config: GLMConfig, rows: Rows, cache: PagedKVCache, pages_a_layer: int
) -> tuple[Float[Array, "rows new vocab"], PagedKVCache]:
    """Return a `decode` that is part of another program."""
    page_size = jax.tree.leaves(cache)[0].shape[2]
    table, active = jnp.asarray(rows.table), jnp.asarray(rows.is_active)
    index = jnp.asarray(rows.index)[:, None] + jnp.arange(active.shape[1], dtype=jnp.int32)
    page = jnp.take_along_axis(table, index // page_size, axis=1)
    ids = rows.adapter_id
    if ids is not None:
        ids = jnp.broadcast_to(jnp.asarray(ids)[:, None], active.shape)
    paging = Paging(
        # What is written for no token lands in page 0, which no one reads.
        pages=jnp.where(active, page, 0),
        offsets=index % page_size,
        tables=table,
        lengths=jnp.where(active, index + 1, 0),
        pages_a_layer=pages_a_layer,
    )
    hidden, cache = glm.forward_hidden(
        params,
        config,
        jnp.asarray(rows.tokens),
        jnp.asarray(rows.position_ids),
        Visibility(jnp.zeros((*active.shape, 2), jnp.int32)),
        cache,
        paging,
        ids,
    )
    return glm.logits(params, config, hidden), cache
