"""Dropout of attention's weights, without an array of them.

Whether a weight is dropped depends on a hash of its position, so that each block of a forward or
a backward pass computes its own part again, and every backend drops the same weights.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32


class WeightDropout(struct.PyTreeNode):
    """Sets a fraction `rate` of the weights to zero, different ones for each seed.

    Attributes:
      seed: uint32 [].
      rate: below 1; 16 bits decide, so that it is a multiple of 2^-16, nearly.
    """

    seed: Any
    rate: float = struct.field(pytree_node=False)

    @property
    def threshold(self) -> int:
        """Weights whose 16 bits of hash are below this stay."""
        return max(1, round((1 - self.rate) * 2**16))

    @property
    def scale(self) -> float:
        """What weights that stay are multiplied by."""
        return 2**16 / self.threshold


def factors(
    dropout: WeightDropout,
    batch: int,
    heads: int,
    rows: Int[Array, " query"],
    columns: Int[Array, " key"],
) -> Float[Array, "batch heads query key"]:
    """Return what weights are multiplied by: 0, or 1 / (1 - rate).

    Args:
      rows, columns: positions of queries and keys in the whole sequence.
    """
    lines = line_hashes(dropout, batch, heads, rows)
    return jnp.where(are_kept(dropout, lines[..., None], columns), dropout.scale, 0.0)


def line_hashes(
    dropout: WeightDropout, batch: int, heads: int, rows: Int[Array, " query"]
) -> UInt32[Array, "batch heads query"]:
    """Return the part of the hash that the weights of a query have in common."""
    heads_of_batch = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads, 1)
    return _mix(_mix(dropout.seed ^ heads_of_batch) ^ rows.astype(jnp.uint32))


def are_kept(
    dropout: WeightDropout,
    lines: UInt32[Array, "..."],
    columns: Int[Array, "..."],
    pairs: Int[Array, "..."] | None = None,
) -> Bool[Array, "..."]:
    """Return which weights stay, by the queries' `line_hashes` and the positions of keys.

    Two keys, 8 apart, take half a hash each: a thread of a GPU's matrix instructions has both,
    whether queries or keys are its rows.

    Args:
      pairs: the first key of each key's pair, where a caller has a cheaper way to it.
    """
    first = (columns & ~8 if pairs is None else pairs).astype(jnp.uint32)
    # Neighbouring keys are far apart, or two rows could share a run of hashes.
    hashes = _mix(lines ^ (first * jnp.uint32(0x9E3779B1)))
    half = jnp.where(columns & 8 != 0, hashes >> 16, hashes & jnp.uint32(0xFFFF))
    return half < jnp.uint32(dropout.threshold)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Permute 32-bit numbers so that each bit depends on all (Wellons' lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
