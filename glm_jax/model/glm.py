"""Embedding, blocks, final norm, logits.

Parameters whose layers are a tuple are unrolled: every kernel and library call takes a layer's
weights where they lie. Stacked layers run in a loop, one block is compiled for all of them, and
each layer's weights are copied out of the stack in every pass, as no call takes a slice.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Int32

from glm_jax.config import GLMConfig
from glm_jax.kernels.attention.api import attention, isolated_attention
from glm_jax.kernels.paged_attention.api import paged_attention
from glm_jax.kernels.quantized_matmul.api import (
    TiledArray,
    is_quantized,
    quantized_matmul,
    take_outputs,
)
from glm_jax.model import cache as kv_cache
from glm_jax.model import paged_cache
from glm_jax.model.cache import KVCache, LayerCache
from glm_jax.model.layers import (
    Dropout,
    apply_rotary,
    drop,
    geglu,
    layer_norm,
    linear,
    rotary_factors,
    weight_dropout,
)
from glm_jax.model.paged_cache import PagedCache, PagedKVCache, Paging
from glm_jax.model.params import GLMParams, LayerParams
from glm_jax.model.streamed_layers import OffloadedLayers, fetch
from glm_jax.model.visibility import Visibility
from glm_jax.numerics import dot_general, products_as
from glm_jax.sharding import constrain, surrounding_mesh

Visible = Int32[Array, "batch query bounds"] | Bool[Array, "batch query key"]
AnyCache = LayerCache | PagedCache
Start = Int32[Array, " batch"] | Paging
Rotary = tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]
HIDDEN_AXES = ("batch", "seq", "embed")


def forward(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[ArrayLike, "batch seq"],
    position_ids: Int[ArrayLike, "batch seq"],
    mask: Visibility | Bool[ArrayLike, "batch seq seq"],
) -> Float[Array, "batch seq vocab"]:
    """Logits of every token.

    Args:
      tokens: ids below vocab_size.
      position_ids: below max_sequence_length.
      mask: who sees whom; as an array, true where the row may see the column.

    Returns:
      float32 [batch, seq, vocab].
    """
    hidden, _ = forward_hidden(params, config, tokens, position_ids, mask)
    return logits(params, config, hidden)


def forward_hidden(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[ArrayLike, "batch seq"],
    position_ids: Int[ArrayLike, "batch seq"],
    mask: Visibility | Bool[ArrayLike, "batch seq key"],
    cache: KVCache | PagedKVCache | None = None,
    start: Int32[ArrayLike, " batch"] | Paging | None = None,
) -> tuple[Float[Array, "batch seq embed"], Any]:
    """Final hidden states, and the cache with these tokens' keys and values.

    Args:
      mask: who sees whom. Its key indices count positions of a cache with rows; with pages
        it is for new tokens that see one another alone, and unused where they have tables.
      cache: earlier keys and values.
      start: the position in the cache of each row's first token here, or what pages ask for.
    """
    visible = mask.key_ranges if isinstance(mask, Visibility) else jnp.asarray(mask)
    rotary = rotary_factors(config, jnp.asarray(position_ids))
    x = embed_tokens(params, config, jnp.asarray(tokens))
    start = start if start is None or isinstance(start, Paging) else jnp.asarray(start)
    if isinstance(params.layers, tuple):
        x, cache = run_unrolled(params.layers, config, x, rotary, visible, cache, start)
    else:
        every = (0, config.num_layers)
        x, cache = run_looped(params.layers, config, x, rotary, visible, cache, start, *every)
    return layer_norm(x, params.final_layernorm, config.layernorm_epsilon), cache


def embed_tokens(
    params: GLMParams, config: GLMConfig, tokens: Int[Array, "batch seq"]
) -> Float[Array, "batch seq embed"]:
    """What the first block takes."""
    return constrain(embed(params, tokens).astype(config.activation_dtype), HIDDEN_AXES)


def embed(params: GLMParams, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
    """Rows of the word embedding."""
    table = params.word_embeddings
    if isinstance(table, TiledArray):
        return take_outputs(table, tokens)
    if tokens.size == 1 and surrounding_mesh() is not None:
        # One row alone would be a slice, for which every device would be sent the whole table.
        return table[jnp.repeat(tokens, 2, axis=1)][:, :1]
    return table[tokens]


def logits(
    params: GLMParams, config: GLMConfig, hidden: Float[Array, "*batch embed"]
) -> Float[Array, "*batch vocab"]:
    """float32 scores of every vocabulary entry, by the word embedding itself."""
    table = params.word_embeddings
    with products_as(config.compute_dtype):
        if is_quantized(table):
            scores = quantized_matmul(hidden, table)
        else:
            table = table.astype(config.activation_dtype)
            scores = dot_general(hidden, table, (((hidden.ndim - 1,), (1,)), ((), ())))
    axes = ("batch", *(("seq",) * (scores.ndim - 2)), "vocab")
    return constrain(scores, axes)


def block(
    x: Float[Array, "batch seq embed"],
    layer: LayerParams,
    config: GLMConfig,
    rotary: Rotary,
    visible: Visible,
    cache: AnyCache | None = None,
    start: Start | None = None,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, "batch seq embed"], AnyCache | None]:
    """One transformer block with DeepNorm residuals (arXiv:2210.02414, section 2.1)."""
    with products_as(config.compute_dtype):
        alpha = jnp.asarray(config.residual_scale, x.dtype)
        h = layer_norm(x, layer.input_layernorm, config.layernorm_epsilon)
        attended, cache = _self_attention(h, layer, config, rotary, visible, cache, start, dropout)
        x = constrain(h * alpha + drop(attended, dropout, 0), HIDDEN_AXES)
        h = layer_norm(x, layer.post_attention_layernorm, config.layernorm_epsilon)
        inner = linear(h, layer.dense_h_to_4h, dropout, 5)
        inner = constrain(inner, ("batch", "seq", None, "mlp"))
        narrow = linear(geglu(inner), layer.dense_4h_to_h, dropout, 6)
        x = constrain(h * alpha + drop(narrow, dropout, 1), HIDDEN_AXES)
    return x, cache


# Traced and lowered once for blocks of the same shapes, of which 70 would take a minute.
_block = jax.jit(block, static_argnames="config")


def _self_attention(
    h: Float[Array, "batch seq embed"],
    layer: LayerParams,
    config: GLMConfig,
    rotary: Rotary,
    visible: Visible,
    cache: AnyCache | None,
    start: Start | None,
    dropout: Dropout | None,
) -> tuple[Float[Array, "batch seq embed"], AnyCache | None]:
    fused = linear(h, layer.query_key_value, dropout, 3)
    fused = constrain(fused, ("batch", "seq", "heads", None, "head_dim"))
    query, key, value = (fused[:, :, :, i] for i in range(3))
    query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
    if isinstance(cache, PagedCache):
        assert isinstance(start, Paging)
        cache = paged_cache.write(cache, key, value, start)
    if isinstance(start, Paging) and start.tables is not None:
        assert isinstance(cache, PagedCache)
        assert start.lengths is not None
        attended = paged_attention(
            query[:, 0],
            cache.keys,
            cache.values,
            start.tables,
            start.lengths,
            cache.key_scales,
            cache.value_scales,
            config.softmax_dtype,
        )[:, None]
    else:
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        keys = LayerCache(keys=key, values=value)
        if isinstance(cache, LayerCache):
            assert start is not None
            assert not isinstance(start, Paging)
            keys = cache = kv_cache.write(cache, key, value, start)
        if isinstance(start, Paging):  # prompts of different requests share a row
            attended = isolated_attention(query, key, value, visible, config.softmax_dtype)
        else:
            attended = attention(
                query,
                keys.keys,
                keys.values,
                visible,
                config.softmax_dtype,
                keys.key_scales,
                keys.value_scales,
                weight_dropout(dropout, 2),
            )
    merged = attended.reshape(*attended.shape[:2], math.prod(attended.shape[2:]))
    return linear(merged, layer.dense, dropout, 4), cache


def run_unrolled(
    layers: tuple[LayerParams, ...],
    config: GLMConfig,
    x: Float[Array, "batch seq embed"],
    rotary: Rotary,
    visible: Visible,
    cache: Any = None,
    start: Start | None = None,
) -> tuple[Float[Array, "batch seq embed"], Any]:
    """Blocks one after another, and the caches of each."""
    written = []
    for i, layer in enumerate(layers):
        layer_cache = None if cache is None else cache[i]
        x, layer_cache = _block(x, layer, config, rotary, visible, layer_cache, start)
        written.append(layer_cache)
    return x, None if cache is None else tuple(written)


def run_looped(
    layers: LayerParams | OffloadedLayers,
    config: GLMConfig,
    x: Float[Array, "batch seq embed"],
    rotary: Rotary,
    visible: Visible,
    cache: Any,
    start: Start | None,
    first: int | Int[Array, ""],
    end: int | Int[Array, ""],
) -> tuple[Float[Array, "batch seq embed"], Any]:
    """Stacked blocks from `first` to `end` (exclusive), and the cache of all of them.

    The cache rides in the carry, so that it is updated in place and not restacked. Of blocks
    that wait in hosts' memory the next one is on its way while one runs.
    """
    run = functools.partial(_run_one, config=config, rotary=rotary, visible=visible, start=start)
    if isinstance(layers, OffloadedLayers):
        return _run_offloaded(run, layers, (x, cache), first, end)
    step = lambda index, carry: run(_take(layers, index), index, carry)
    carried: tuple[Array, Any] = jax.lax.fori_loop(first, end, step, (x, cache))
    return carried


def _take(stack: Any, index: int | Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)


def _run_one(
    layer: LayerParams,
    index: int | Array,
    carry: tuple[Array, Any],
    *,
    config: GLMConfig,
    rotary: Rotary,
    visible: Visible,
    start: Start | None,
) -> tuple[Array, Any]:
    x, cache = carry
    if isinstance(cache, PagedCache):
        assert isinstance(start, Paging)
        return _block(x, layer, config, rotary, visible, cache, start.of_layer(index))
    layer_cache = None if cache is None else _take(cache, index)
    x, layer_cache = _block(x, layer, config, rotary, visible, layer_cache, start)
    if cache is not None:
        cache = jax.tree.map(lambda c, new: c.at[index].set(new), cache, layer_cache)
    return x, cache


def _run_offloaded(
    run: Any, layers: OffloadedLayers, carry: Any, first: int | Array, end: int | Array
) -> Any:
    kept, last = layers.resident_count, layers.streamed_count - 1
    within = lambda bound, low, high: (
        min(max(bound, low), high) if isinstance(bound, int) else jnp.clip(bound, low, high)
    )
    for index, layer in enumerate(layers.resident):
        is_within = (first <= index) & (index < end)
        carry = _run_if(is_within, functools.partial(run, layer, index), carry)
    begin, stop = (within(bound - kept, 0, last + 1) for bound in (first, end))

    def two(number: Array, carried: Any) -> Any:
        # Two blocks a turn: with one, that which came would be copied to where that one lay.
        layer, carry = carried
        index = begin + 2 * number
        second = fetch(layers.streamed, jnp.minimum(index + 1, last))
        carry = run(layer, index + kept, carry)
        # The third goes to the memory of the first, which has run, while the second runs.
        third = jnp.minimum(index + 2, last)
        second, third, carry = jax.lax.optimization_barrier((second, third, carry))
        following = fetch(layers.streamed, third)
        return following, run(second, index + 1 + kept, carry)

    fetched = fetch(layers.streamed, within(begin, 0, last))
    count = within(stop - begin, 0, last + 1)
    fetched, carry = jax.lax.fori_loop(0, count // 2, two, (fetched, carry))
    one = functools.partial(run, fetched, stop - 1 + kept)
    return _run_if(count % 2 == 1, one, carry)


def _run_if(is_run: bool | Array, run: Any, carry: Any) -> Any:
    if isinstance(is_run, bool):
        return run(carry) if is_run else carry
    return jax.lax.cond(is_run, run, lambda carry: carry, carry)
