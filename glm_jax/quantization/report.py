"""What quantising cost, weight by weight."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from glm_jax.quantization.array import QuantizedArray, dequantize


@dataclasses.dataclass(frozen=True)
class Entry:
    """One weight of one layer.

    Attributes:
      name: path in the parameter tree.
      layer: index, None for what is not stacked over layers.
      relative_error: root of the squared error over the squared weight.
      bits_per_weight: scales and zero points included.
      num_bytes: of values, scales and zero points.
    """

    name: str
    layer: int | None
    relative_error: float
    bits_per_weight: float
    num_bytes: int


def report(params: Any, quantized: Any) -> list[Entry]:
    """An `Entry` for each quantised weight of a tree, beside the floats it was made from.

    Args:
      params: a tree of float arrays.
      quantized: the same tree with a `QuantizedArray` for some of them.
    """
    is_quantized = lambda leaf: isinstance(leaf, QuantizedArray)
    found = jax.tree_util.tree_leaves_with_path(quantized, is_leaf=is_quantized)
    originals = jax.tree.leaves(params)
    entries = []
    for (path, array), weight in zip(found, originals, strict=True):
        if not is_quantized(array):
            continue
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        is_stacked = len(array.shape) + array.contraction_axis == 1
        errors = np.atleast_1d(_relative_error(weight, array, is_stacked))
        num_bytes, bits = array.nbytes // len(errors), 8 * array.nbytes / array.size
        entries += [
            Entry(name, i if is_stacked else None, float(error), bits, num_bytes)
            for i, error in enumerate(errors)
        ]
    return entries


def as_table(entries: Iterable[Entry]) -> str:
    """The entries as lines of text under a header."""
    lines = [f"{'weight':<36}{'layer':>6}{'error':>9}{'bits/weight':>13}{'bytes':>14}"]
    for entry in entries:
        layer = "" if entry.layer is None else entry.layer
        lines.append(
            f"{entry.name:<36}{layer:>6}{entry.relative_error:>9.3%}"
            f"{entry.bits_per_weight:>13.2f}{entry.num_bytes:>14,}"
        )
    return "\n".join(lines)


@jax.jit(static_argnums=2)
def _relative_error(
    weight: Float[Array, "..."], array: QuantizedArray, is_stacked: bool
) -> Float[Array, "..."]:
    def one(weight: Array, array: QuantizedArray) -> Array:
        wide = weight.astype(jnp.float32)
        error = dequantize(array, wide.dtype) - wide
        return jnp.sqrt(jnp.sum(error**2) / jnp.maximum(jnp.sum(wide**2), 1e-30))

    if not is_stacked:
        return one(weight, array)
    # Layer after layer: all at once would hold the whole model in float32.
    return jax.lax.map(lambda pair: one(*pair), (weight, array))
