"""A product whose weight is divided among the devices of a mesh."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul.mosaic_layout import MosaicArray, count_outer
from glm_jax.numerics import product_dtype
from glm_jax.quantization import QuantizedArray
from glm_jax.sharding import data_axis, mesh_to_divide, parameter_spec, per_device

Divisible = QuantizedArray | MosaicArray
Product = Callable[[Array, Divisible, Array | None], Array]
Transposed = Callable[[Array, Divisible], Array]


def applies(weight: Any) -> TypeGuard[Divisible]:
    """Whether there is a mesh to divide the product over, and the weight's axes are known."""
    return weight.axes is not None and mesh_to_divide() is not None


def matmul(
    product: Product,
    x: Float[Array, "..."],
    weight: Divisible,
    bias: Float[Array, "..."] | None,
) -> Float[Array, "..."]:
    """x [..., K] times weight [K, *outputs] plus bias, each device with its part.

    The weight never moves. x is all-gathered to the devices that have other outputs of the
    weight; where devices have other inputs, partial sums are all-reduced, in `product_dtype`. Rows
    are divided over the data axis alone.

    Args:
      product: multiplies on one device.

    Returns:
      float32 [..., *outputs], outputs divided as the weight's are.
    """
    weight, weight_spec, (inputs, *outputs) = divide(weight)
    batch = _batch_axes(x.shape[:-1])

    def local(x: Array, weight: Divisible, bias: Array | None) -> Array:
        if inputs is None:
            return product(x, weight, bias)
        return jax.lax.psum(product(x, weight, None).astype(product_dtype(x)), inputs)

    whole = None if inputs is not None else bias
    result = per_device(
        local,
        in_specs=(
            PartitionSpec(*batch, inputs),
            weight_spec,
            None if whole is None else PartitionSpec(*outputs),
        ),
        out_specs=PartitionSpec(*batch, *outputs),
    )(x, weight, whole).astype(jnp.float32)
    # Outside: where a part of each row is wanted next, the sum is scattered only if nothing
    # stands between the two.
    return result if inputs is None or bias is None else result + bias.astype(jnp.float32)


def transposed_matmul(
    product: Transposed, gradient: Float[Array, "..."], weight: Divisible
) -> Float[Array, "..."]:
    """gradient [..., *outputs] times the transpose of weight, as `matmul` divides it.

    Where devices have other outputs of the weight, partial sums are all-reduced in the gradient's
    dtype.

    Args:
      product: multiplies on one device.

    Returns:
      [..., K], divided as the weight's inputs are.
    """
    weight, weight_spec, (inputs, *outputs) = divide(weight)
    batch = _batch_axes(gradient.shape[: gradient.ndim - len(outputs)])
    summed = tuple(axis for axis in outputs if axis is not None)

    def local(gradient: Array, weight: Divisible) -> Array:
        part = product(gradient, weight)
        return jax.lax.psum(part, summed) if summed else part

    return per_device(
        local,
        in_specs=(PartitionSpec(*batch, *outputs), weight_spec),
        out_specs=PartitionSpec(*batch, inputs),
    )(gradient, weight)


def divide(weight: Divisible) -> tuple[Any, Any, PartitionSpec]:
    """Return the weight, its groups split so that each part has whole ones; the mesh axes of its
    arrays in a tree like it; and those of [K, *outputs]."""
    assert weight.axes is not None
    mesh = jax.sharding.get_abstract_mesh()
    if isinstance(weight, MosaicArray):
        tiles = weight.values.shape[-3]
        spec = parameter_spec(mesh.shape, weight.axes, (tiles, *weight.shape[1:]))
        inputs, *outputs = spec
        return weight, specs_of_tiles(weight, inputs, outputs), spec
    spec = parameter_spec(mesh.shape, weight.axes, weight.values.shape)
    inputs, *outputs = spec
    weight = _with_groups_for(weight, 1 if inputs is None else mesh.shape[inputs])
    scales_spec = PartitionSpec(inputs if weight.groups > 1 else None, *outputs)
    tree = dataclasses.replace(
        weight,
        values=spec,
        scales=scales_spec,
        zero_points=None if weight.zero_points is None else scales_spec,
    )
    return weight, tree, spec


def specs_of_tiles(
    weight: Divisible, inputs: str | None, outputs: Sequence[str | None]
) -> MosaicArray:
    """Return the mesh axes of a `MosaicArray`, in a tree like it.

    Args:
      weight: that array, or the weight as it is stored.
      inputs, outputs: mesh axes of K and of the outputs.
    """
    outer = count_outer(weight.shape[1:])
    of_scales = PartitionSpec(inputs if weight.groups > 1 else None, *outputs)
    return MosaicArray(
        values=PartitionSpec(*outputs[: outer + 1], inputs, None, None),
        scales=of_scales,
        bits=weight.bits,
        zero_points=None if weight.zero_points is None else of_scales,
        axes=weight.axes,
    )


def _batch_axes(leading: tuple[int, ...]) -> list[str | None]:
    """Of activations' leading axes: rows are divided over data, where they can be."""
    return [data_axis(leading[0]), *[None] * (len(leading) - 1)] if leading else []


def _with_groups_for(weight: QuantizedArray, parts: int) -> QuantizedArray:
    """Return the same weight, its groups split so that each part of the inputs has whole ones."""
    if weight.groups == 1 or weight.groups % parts == 0:
        return weight
    copies = math.lcm(weight.groups, parts) // weight.groups
    repeat = lambda a: None if a is None else jnp.repeat(a, copies, axis=0)
    return dataclasses.replace(
        weight, scales=repeat(weight.scales), zero_points=repeat(weight.zero_points)
    )
