"""Embedding, blocks, final norm, logits."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Int32

from glm_jax.config import GLMConfig
from glm_jax.kernels.attention.api import attention, isolated_attention
from glm_jax.kernels.geglu.api import geglu
from glm_jax.kernels.paged_attention.api import paged_attention
from glm_jax.model import paged_cache
from glm_jax.model.adapters import choose_adapters
from glm_jax.model.layer_stacks import Index, as_layers
from glm_jax.model.layers import (
    Dropout,
    apply_rotary,
    drop,
    layer_norm,
    linear,
    rotary_factors,
    weight_dropout,
)
from glm_jax.model.paged_cache import PagedCache, PagedKVCache, Paging
from glm_jax.model.params import GLMParams, LayerParams
from glm_jax.model.visibility import Visibility
from glm_jax.numerics import products_as
from glm_jax.sharding import LogicalAxes, constrain, gather, scatter

Visible = Int32[Array, "batch query bounds"] | Bool[Array, "batch query key"]
Rotary = tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]
HIDDEN_AXES = ("batch", "seq", "embed")


def forward(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[ArrayLike, "batch seq"],
    position_ids: Int[ArrayLike, "batch seq"],
    mask: Visibility | Bool[ArrayLike, "batch seq seq"],
    adapter_ids: Int[ArrayLike, "batch seq"] | None = None,
) -> Float[Array, "batch seq vocab"]:
    """Logits of every token.

    Args:
      tokens: ids below vocab_size.
      position_ids: below max_sequence_length.
      mask: who sees whom; as an array, true where the row may see the column.
      adapter_ids: of a model with several adapters, that of each token, from 1 on in the order in
        which they were given; 0 for none, as by default.

    Returns:
      float32 [batch, seq, vocab].
    """
    hidden, _ = forward_hidden(params, config, tokens, position_ids, mask, adapter_ids=adapter_ids)
    return logits(params, config, hidden)


def forward_hidden(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[ArrayLike, "batch seq"],
    position_ids: Int[ArrayLike, "batch seq"],
    mask: Visibility | Bool[ArrayLike, "batch seq key"],
    cache: PagedKVCache | None = None,
    paging: Paging | None = None,
    adapter_ids: Int[ArrayLike, "batch seq"] | None = None,
) -> tuple[Float[Array, "batch seq embed"], Any]:
    """Return the final hidden states, and the cache with these tokens' keys and values.

    Args:
      mask: who sees whom among these tokens; unused where `paging` has tables.
      cache: pages of earlier keys and values.
      paging: where these tokens' go; given with a cache.
      adapter_ids: see `forward`.
    """
    visible = mask.key_ranges if isinstance(mask, Visibility) else jnp.asarray(mask)
    rotary = rotary_factors(config, jnp.asarray(position_ids))
    x = embed_tokens(params, config, jnp.asarray(tokens))
    ids = None if adapter_ids is None else jnp.asarray(adapter_ids)
    x, cache = run_layers(params.layers, config, x, rotary, visible, cache, paging, adapter_ids=ids)
    return layer_norm(x, params.final_layernorm, config.layernorm_epsilon), cache


def embed_tokens(
    params: GLMParams, config: GLMConfig, tokens: Int[Array, "batch seq"]
) -> Float[Array, "batch seq embed"]:
    """Return what the first block takes."""
    return constrain(embed(params, tokens).astype(config.activation_dtype), HIDDEN_AXES)


@jax.named_scope("embedding")
def embed(params: GLMParams, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
    """Rows of the word embedding."""
    return params.embedding.take_rows(tokens)


@jax.named_scope("logits")
def logits(
    params: GLMParams, config: GLMConfig, hidden: Float[Array, "*batch embed"]
) -> Float[Array, "*batch vocab"]:
    """float32 scores of every vocabulary entry, by the word embedding itself."""
    with products_as(config.compute_dtype):
        scores = params.embedding.transposed_matmul(hidden)
    axes = ("batch", *(("seq",) * (scores.ndim - 2)), "vocab")
    return constrain(scores, axes)


def block(
    x: Float[Array, "batch seq embed"],
    layer: LayerParams,
    config: GLMConfig,
    rotary: Rotary,
    visible: Visible,
    cache: PagedCache | None = None,
    paging: Paging | None = None,
    dropout: Dropout | None = None,
    implementation: str | None = None,
    residual_axes: LogicalAxes = HIDDEN_AXES,
) -> tuple[Float[Array, "batch seq embed"], PagedCache | None]:
    """One transformer block with DeepNorm residuals (arXiv:2210.02414, section 2.1).

    Args:
      implementation: of attention without a cache; see `attention`.
      residual_axes: logical axes of x, and of all between a product and the next.
    """
    with products_as(config.compute_dtype):
        alpha = jnp.asarray(config.residual_scale, x.dtype)
        h = layer_norm(x, layer.input_layernorm, config.layernorm_epsilon)
        attended, cache = _self_attention(
            gather(h, residual_axes, HIDDEN_AXES),
            layer,
            config,
            rotary,
            visible,
            cache,
            paging,
            dropout,
            implementation,
        )
        attended = scatter(attended, residual_axes, HIDDEN_AXES)
        x = constrain(h * alpha + drop(attended, dropout, 0), residual_axes)
        h = layer_norm(x, layer.post_attention_layernorm, config.layernorm_epsilon)
        fed_forward = _feed_forward(gather(h, residual_axes, HIDDEN_AXES), layer, dropout)
        fed_forward = scatter(fed_forward, residual_axes, HIDDEN_AXES)
        x = constrain(h * alpha + drop(fed_forward, dropout, 1), residual_axes)
    return x, cache


# Traced and lowered once for all blocks of the same shapes: 70 of them would take a minute.
_block = jax.jit(block, static_argnames="config")


@jax.named_scope("feed_forward")
def _feed_forward(h: Array, layer: LayerParams, dropout: Dropout | None) -> Array:
    inner = linear(h, layer.dense_h_to_4h, dropout, 5)
    inner = constrain(inner, ("batch", "seq", None, "mlp"))
    return linear(geglu(inner), layer.dense_4h_to_h, dropout, 6)


@jax.named_scope("attention")
def _self_attention(
    h: Float[Array, "batch seq embed"],
    layer: LayerParams,
    config: GLMConfig,
    rotary: Rotary,
    visible: Visible,
    cache: PagedCache | None,
    paging: Paging | None,
    dropout: Dropout | None,
    implementation: str | None,
) -> tuple[Float[Array, "batch seq embed"], PagedCache | None]:
    fused = linear(h, layer.query_key_value, dropout, 3)
    fused = constrain(fused, ("batch", "seq", "heads", None, "head_dim"))
    query, key, value = (fused[:, :, :, i] for i in range(3))
    query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
    if cache is not None:
        assert paging is not None
        cache = paged_cache.write(cache, key, value, paging)
    if cache is not None and paging is not None and paging.tables is not None:
        assert paging.lengths is not None
        attended = paged_attention(
            query,
            cache.keys,
            cache.values,
            paging.tables,
            paging.lengths,
            cache.key_scales,
            cache.value_scales,
            config.softmax_dtype,
        )
    else:
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if paging is not None:  # prompts of different requests share a row
            attended = isolated_attention(query, key, value, visible, config.softmax_dtype)
        else:
            attended = attention(
                query,
                key,
                value,
                visible,
                config.softmax_dtype,
                weight_dropout(dropout, 2),
                implementation,
            )
    merged = attended.reshape(*attended.shape[:2], math.prod(attended.shape[2:]))
    return linear(merged, layer.dense, dropout, 4), cache


def run_layers(
    layers: Any,
    config: GLMConfig,
    x: Float[Array, "batch seq embed"],
    rotary: Rotary,
    visible: Visible,
    cache: Any = None,
    paging: Paging | None = None,
    bounds: tuple[Index, Index] | None = None,
    adapter_ids: Int[Array, "batch seq"] | None = None,
) -> tuple[Float[Array, "batch seq embed"], Any]:
    """Run a model's layers, and return what the last one gives and the cache of all.

    Args:
      layers: in any form that `as_layers` takes.
      bounds: of the layers that run, the second one exclusive; by default all.
      adapter_ids: see `forward`.
    """

    def step(layer: LayerParams, index: Index, x: Array, own: Any) -> tuple[Array, Any]:
        # Layers that share a cache have pages after one another in it.
        at = None if paging is None else paging.of_layer(index)
        layer = choose_adapters(layer, adapter_ids)
        return _block(x, layer, config, rotary, visible, own, at)

    return as_layers(layers).run(step, x, cache, bounds)
