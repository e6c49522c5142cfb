"""The parts of a block, as plain functions."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from glm_jax.config import GLMConfig
from glm_jax.kernels.attention.dropout import WeightDropout, factors
from glm_jax.kernels.layer_norm import api as kernel
from glm_jax.model.params import LayerNormParams, LinearParams

PRODUCT = "product"  # name of a linear's result, for policies of `jax.checkpoint`


def layer_norm(
    x: Float[Array, "*batch embed"], params: LayerNormParams, epsilon: float
) -> Float[Array, "*batch embed"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, in float32 within."""
    return kernel.layer_norm(x, params.scale, params.bias, epsilon)


@struct.dataclass
class Dropout:
    """Sets a share `rate` of the numbers to zero, chosen by the key.

    Attributes:
      attention_rate: the share of attention's weights.
      adapter_rate: the share of an adapter's inputs.
    """

    key: Any
    rate: float = struct.field(pytree_node=False)
    attention_rate: float = struct.field(pytree_node=False, default=0.0)
    adapter_rate: float = struct.field(pytree_node=False, default=0.0)

    def of_layer(self, index: Int[Array, ""] | int) -> "Dropout":
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, index))


def weight_dropout(dropout: Dropout | None, salt: int) -> WeightDropout | None:
    """Dropout of attention's weights, which are never materialised; `salt`: see `drop`."""
    if dropout is None or dropout.attention_rate == 0:
        return None
    return WeightDropout(_seed(dropout.key, salt), dropout.attention_rate)


def _seed(key: Array, salt: int) -> Array:
    return jax.random.bits(jax.random.fold_in(key, salt), dtype=jnp.uint32)


def drop(x: Float[Array, "..."], dropout: Dropout | None, salt: int) -> Float[Array, "..."]:
    """Apply dropout to x, and divide what remains by the share that remains.

    Args:
      salt: folded into the key; unique for each call site.
    """
    return x if dropout is None else _drop(x, dropout.rate, dropout.key, salt)


def _drop(x: Array, rate: float, key: Array, salt: int) -> Array:
    return x if rate == 0 else _dropped(x, WeightDropout(_seed(key, salt), rate))


@jax.custom_vjp
def _dropped(x: Array, dropout: WeightDropout) -> Array:
    # Attention's hash instead of jax.random's bits: a tenth of their instructions, so that the
    # backward pass computes the mask again and none is stored.
    # The barrier makes a mask wait for what it is of: otherwise the compiler computes those of
    # all layers at once, before the first one runs, and stores them.
    x, dropout = jax.lax.optimization_barrier((x, dropout))
    *batch, rows, columns = (1, *x.shape)
    numbers = jnp.arange(rows), jnp.arange(columns)
    multipliers = factors(dropout, math.prod(batch), 1, *numbers).reshape(x.shape)
    return (x.astype(jnp.float32) * multipliers).astype(x.dtype)


_dropped.defvjp(
    lambda x, dropout: (_dropped(x, dropout), dropout),
    lambda dropout, gradient: (_dropped(gradient, dropout), None),
)


def linear(
    x: Float[Array, "..."], params: LinearParams, dropout: Dropout | None = None, salt: int = 0
) -> Float[Array, "..."]:
    """x [..., inputs] times a weight [inputs, *outputs] plus bias.

    Accumulates in float32 and rounds once, to x's dtype.

    Args:
      dropout: of the inputs of the weight's adapter, if it has one.
      salt: see `drop`.
    """

    def adapter_dropout(x: Array) -> Array:
        return x if dropout is None else _drop(x, dropout.adapter_rate, dropout.key, salt)

    product = params.weight.matmul(x, params.bias, adapter_dropout).astype(x.dtype)
    return checkpoint_name(product, PRODUCT)


def rotary_tables(config: GLMConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """inv_freq [head_dim / 2], and cos and sin [max_sequence_length, head_dim / 2].

    With rotary_dtype "float16" every step is rounded to float16 (frequency, angle,
    cosine, sine), as in the released model, whose weights grew up with those errors. The
    original run in float32 rounds the frequency alone, and so does this.
    Computed on the host, so that every backend has the same tables.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inv_freq = np.float32(1) / np.float32(config.rotary_base) ** exponent
    inv_freq = inv_freq.astype(config.rotary_dtype)
    dtype = "float32" if config.activation_dtype == "float32" else config.rotary_dtype
    positions = np.arange(config.max_sequence_length).astype(dtype)
    angles = (positions[:, None] * inv_freq[None, :].astype(dtype)).astype(np.float32)
    cos = np.cos(angles).astype(dtype)
    sin = np.sin(angles).astype(dtype)
    return inv_freq, cos, sin


def rotary_factors(
    config: GLMConfig, position_ids: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """float32 cosines and sines for the given positions."""
    _, cos, sin = rotary_tables(config)
    take = lambda table: jnp.asarray(table)[position_ids].astype(jnp.float32)
    return take(cos), take(sin)


def apply_rotary(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates pairs (i, i + head_dim / 2) of each head by the position's angle."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
