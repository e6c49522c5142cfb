"""Dropout of attention's weights, without an array of them.

Whether a weight is dropped depends on a hash of its position, so that each block of a forward or
a backward pass computes its own part again, and every backend drops the same weights.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, UInt32


class WeightDropout(struct.PyTreeNode):
    """Sets a fraction `rate` of the weights to zero, different ones for each seed.

    Attributes:
      seed: uint32 [].
      rate: below 1.
    """

    seed: Any
    rate: float = struct.field(pytree_node=False)

    @property
    def threshold(self) -> int:
        """Weights whose hash is above this become zero."""
        return round((1 - self.rate) * 2**32) - 1


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
    return factors_of_lines(dropout, lines[..., None], columns)


def line_hashes(
    dropout: WeightDropout, batch: int, heads: int, rows: Int[Array, " query"]
) -> UInt32[Array, "batch heads query"]:
    """Return the part of the hash that the weights of a query have in common."""
    heads_of_batch = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads, 1)
    return _mix(_mix(dropout.seed ^ heads_of_batch) ^ rows.astype(jnp.uint32))


def factors_of_lines(
    dropout: WeightDropout, lines: UInt32[Array, "..."], columns: Int[Array, "..."]
) -> Float[Array, "..."]:
    """`factors` by the queries' `line_hashes` and the positions of keys, whose shapes broadcast."""
    # Neighbouring keys are far apart, or two rows could share a run of hashes.
    hashes = _mix(lines ^ (columns.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)))
    return jnp.where(hashes <= jnp.uint32(dropout.threshold), 1 / (1 - dropout.rate), 0.0)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A permutation of 32-bit numbers in which each bit depends on all (Wellons' lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
