"""The programs of the engine: a prefill, layers at a time, and a step of all slots.

A prefill puts keys and values of packed prompts into pages and computes no scores: a prompt's
last token (sop, or the last of a prefix) is left to the step, which sees all before it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from glm_jax.config import GLMConfig
from glm_jax.engine.slots import Emitted, Slots, choose, put_back
from glm_jax.model import glm
from glm_jax.model.layer_stacks import as_layers
from glm_jax.model.layers import rotary_factors
from glm_jax.model.paged_cache import PagedKVCache, Paging
from glm_jax.model.params import GLMParams
from glm_jax.model.visibility import Visibility


@struct.dataclass
class Pack:
    """Prompts after one another; a row for each group of devices that has its own slots.

    Attributes:
      tokens, position_ids: int32 [rows, seq]; padding at the end.
      visibility: each prompt's tokens see their own context, or padding itself.
      paging: where keys and values go.
    """

    tokens: Int[Any, "rows seq"]
    position_ids: Int[Any, "rows seq"]
    visibility: Visibility
    paging: Paging


@functools.partial(jax.jit, static_argnames="config")
def embed(params: GLMParams, config: GLMConfig, pack: Pack) -> Float[Array, "rows seq embed"]:
    """What the first block takes."""
    return glm.embed_tokens(params, config, jnp.asarray(pack.tokens))


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("x", "cache"))
def prefill_layers(
    layers: Any,
    config: GLMConfig,
    x: Float[Array, "rows seq embed"],
    pack: Pack,
    cache: PagedKVCache,
    first: int | Int[Any, ""],
    end: int | Int[Any, ""],
) -> tuple[Float[Array, "rows seq embed"], PagedKVCache]:
    """Runs a pack through some blocks.

    Args:
      layers: stacked, of which those from `first` to `end` run; or a tuple of them that all
        run, with the pages of each in `cache`.
    """
    rotary = rotary_factors(config, pack.position_ids)
    ranges = pack.visibility.key_ranges
    bounds = None if as_layers(layers).is_apart else (first, end)
    return glm.run_layers(layers, config, x, rotary, ranges, cache, pack.paging, bounds)


@functools.partial(
    jax.jit, static_argnames=("config", "pages_a_layer"), donate_argnames=("slots", "cache")
)
def step(
    params: GLMParams,
    config: GLMConfig,
    slots: Slots,
    cache: PagedKVCache,
    pages_a_layer: int,
    numbers: Int[Any, " rows"] | None = None,
) -> tuple[Emitted, Slots, PagedKVCache]:
    """The next token of every active slot.

    Args:
      pages_a_layer: of a device where layers share an array, else 0.
      numbers: of the slots that run, each once, every active one among them; None runs all.

    Returns:
      What it gives those that ran; then slots and pages.
    """
    if numbers is None:
        return _step(params, config, slots, cache, pages_a_layer)
    some: Slots = jax.tree.map(lambda x: x[numbers], slots)
    emitted, some, cache = _step(params, config, some, cache, pages_a_layer)
    return emitted, put_back(slots, numbers, some), cache


@functools.partial(jax.jit, donate_argnames="cache")
def clear_failed(cache: PagedKVCache) -> PagedKVCache:
    """The cache with 0 for what is no finite number. Pages are read whole, and NaN times the
    probability 0 of a masked position is NaN: a failed request's would fail the next to have them.
    """

    def clear(x: Array) -> Array:
        return jnp.where(jnp.isfinite(x), x, 0) if jnp.issubdtype(x.dtype, jnp.floating) else x

    cleared: PagedKVCache = jax.tree.map(clear, cache)
    return cleared


def _step(
    params: GLMParams, config: GLMConfig, slots: Slots, cache: PagedKVCache, pages_a_layer: int
) -> tuple[Emitted, Slots, PagedKVCache]:
    page_size = jax.tree.leaves(cache)[0].shape[2]
    active = slots.is_active
    page = jnp.take_along_axis(slots.table, slots.index[:, None] // page_size, axis=1)
    paging = Paging(
        # What a slot without a request writes lands in page 0, which no one reads.
        pages=jnp.where(active[:, None], page, 0),
        offsets=slots.index[:, None] % page_size,
        tables=slots.table,
        lengths=jnp.where(active, slots.index + 1, 0),
        pages_a_layer=pages_a_layer,
    )
    hidden, cache = glm.forward_hidden(
        params,
        config,
        slots.token[:, None],
        slots.position_id[:, None],
        Visibility(jnp.zeros((len(active), 1, 2), jnp.int32)),
        cache,
        paging,
    )
    emitted, slots = choose(glm.logits(params, config, hidden[:, 0]), slots)
    return emitted, slots, cache
