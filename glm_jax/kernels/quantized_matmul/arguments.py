"""What the backends of quantized_matmul are called with."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

INTEGERS = ("int8", "int4")  # the numbers that kernels unpack


@struct.dataclass
class Arguments:
    """A product on one device, as one pytree.

    Attributes:
      x: [rows, K]; of the transposed product [rows, N].
      weight: [K, N], a QuantizedArray, or what a backend laid out for itself: `weight.layout`
        says which.
      bias: [N] or None.
    """

    x: Any  # or what jax puts in its place while it transforms a function
    weight: Any
    bias: Any = None

    @property
    def is_as_stored(self) -> tuple[bool, str]:
        """Whether the weight has no backend's layout, for `dispatch.unmet`."""
        return self.weight.layout == "stored", "a weight in no other backend's layout"

    @property
    def has_stored_integers(self) -> tuple[bool, str]:
        """Whether the weight is one of integers in no backend's layout, for `dispatch.unmet`."""
        is_as_stored, requirement = self.is_as_stored
        is_met = is_as_stored and self.weight.stored_dtype in INTEGERS
        return is_met, f"{requirement}, of {' or '.join(INTEGERS)}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of a product that a kernel's division of its work depends on.

    Attributes:
      rows: of activations.
      inputs, outputs: K and N of the weight [K, N].
      bits: of a weight.
      group_size: inputs that share a scale.
      zeros: whether the weight has zero points.
      transposed: the product with the transpose, whose activations are [rows, N].
    """

    rows: int
    inputs: int
    outputs: int
    bits: int
    group_size: int
    zeros: bool = False
    transposed: bool = False

    @classmethod
    def of(cls, x: Any, weight: Any, transposed: bool = False) -> "Problem":
        """Return the product of activations and a weight [K, N]; both may be described."""
        (inputs, outputs), has_zeros = weight.shape, weight.zero_points is not None
        return cls(len(x), inputs, outputs, weight.bits, weight.group_size, has_zeros, transposed)

    def has_whole_groups_in(self, inputs: int) -> bool:
        """Whether a step of so many inputs has whole groups, or a group whole steps."""
        return inputs % self.group_size == 0 or self.group_size % inputs == 0


def add_bias(product: Array, bias: Array | None) -> Array:
    return product if bias is None else product + bias.astype(jnp.float32)
