"""Two signed 4-bit numbers in one byte."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8


def pack_int4(values: Int8[Array, "..."], axis: int) -> Int8[Array, "..."]:
    """Pack neighbours along `axis`: the even index goes to the high four bits.

    Args:
      values: int8 in [-8, 7]; its size along `axis` is even.
      axis: the axis that halves.
    """
    return join_bytes(*_split_pairs(values, axis))


def join_bytes(even: Int8[Array, "..."], odd: Int8[Array, "..."]) -> Int8[Array, "..."]:
    """Inverse of `split_bytes` for int8 in [-8, 7]."""
    return ((even << 4) | (odd & 0x0F)).astype(jnp.int8)


def unpack_int4(packed: Int8[Array, "..."], axis: int) -> Int8[Array, "..."]:
    """Inverse of `pack_int4`: int8 in [-8, 7], twice as long along `axis`."""
    axis = axis % packed.ndim
    pairs = jnp.stack(split_bytes(packed), axis=axis + 1)
    shape = (*packed.shape[:axis], 2 * packed.shape[axis], *packed.shape[axis + 1 :])
    return pairs.reshape(shape)


def split_bytes(packed: Int[Array, "..."]) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Return the two numbers of each byte, the even index first.

    Args:
      packed: int8, or the same sign-extended to a wider integer.
    """
    shift = 8 * packed.dtype.itemsize - 4
    return packed >> 4, (packed << shift) >> shift  # shifts to the right keep the sign


def interleaved_planes(
    x: Float[Array, "rows inputs"], per_byte: int
) -> Float[Array, "planes rows packed"]:
    """Return inputs in the order of `split_bytes`: all first ones of a byte, then the second."""
    return x.reshape(x.shape[0], -1, per_byte).transpose(2, 0, 1)


def _split_pairs(values: Int8[Array, "..."], axis: int) -> tuple[Array, Array]:
    axis = axis % values.ndim
    size = values.shape[axis]
    shape = (*values.shape[:axis], size // 2, 2, *values.shape[axis + 1 :])
    pairs = values.reshape(shape)
    return jnp.take(pairs, 0, axis=axis + 1), jnp.take(pairs, 1, axis=axis + 1)
