"""A product whose weight is divided among the devices of a mesh."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from glm_jax.quantization import QuantizedArray
from glm_jax.sharding import data_axis, mesh_to_divide, parameter_spec, per_device

Product = Callable[[Array, QuantizedArray, Array | None], Array]
Transposed = Callable[[Array, QuantizedArray], Array]


def applies(weight: Any) -> TypeGuard[QuantizedArray]:
    """Whether there is a mesh to divide the product over, and the weight's axes are known."""
    return weight.axes is not None and mesh_to_divide() is not None


def matmul(
    product: Product,
    x: Float[Array, "..."],
    weight: QuantizedArray,
    bias: Float[Array, "..."] | None,
) -> Float[Array, "..."]:
    """x [..., K] times weight [K, *outputs] plus bias, each device with its part.

    The weight never moves. x is all-gathered to the devices that have other outputs of the
    weight; where devices have other inputs, partial sums are all-reduced. Rows are divided over
    the data axis alone.

    Args:
      product: multiplies on one device.

    Returns:
      float32 [..., *outputs], outputs divided as the weight's are.
    """
    weight, weight_spec = _divided(weight)
    inputs, *outputs = weight_spec.values
    batch = _batch_axes(x.shape[:-1])

    def local(x: Array, weight: QuantizedArray, bias: Array | None) -> Array:
        if inputs is None:
            return product(x, weight, bias)
        total = jax.lax.psum(product(x, weight, None), inputs)
        return total if bias is None else total + bias.astype(jnp.float32)

    return per_device(
        local,
        in_specs=(
            PartitionSpec(*batch, inputs),
            weight_spec,
            None if bias is None else PartitionSpec(*outputs),
        ),
        out_specs=PartitionSpec(*batch, *outputs),
    )(x, weight, bias)


def transposed_matmul(
    product: Transposed, gradient: Float[Array, "..."], weight: QuantizedArray
) -> Float[Array, "..."]:
    """gradient [..., *outputs] times the transpose of weight, as `matmul` divides it.

    Where devices have other outputs of the weight, partial sums are all-reduced in the gradient's
    dtype.

    Args:
      product: multiplies on one device.

    Returns:
      [..., K], divided as the weight's inputs are.
    """
    weight, weight_spec = _divided(weight)
    inputs, *outputs = weight_spec.values
    batch = _batch_axes(gradient.shape[: gradient.ndim - len(outputs)])
    summed = tuple(axis for axis in outputs if axis is not None)

    def local(gradient: Array, weight: QuantizedArray) -> Array:
        part = product(gradient, weight)
        return jax.lax.psum(part, summed) if summed else part

    return per_device(
        local,
        in_specs=(PartitionSpec(*batch, *outputs), weight_spec),
        out_specs=PartitionSpec(*batch, inputs),
    )(gradient, weight)


def _divided(weight: QuantizedArray) -> tuple[QuantizedArray, Any]:
    """The weight, its groups split so that each part has whole ones, and the mesh axes of its
    arrays in a tree like it."""
    assert weight.axes is not None
    mesh = jax.sharding.get_abstract_mesh()
    inputs, *outputs = parameter_spec(mesh.shape, weight.axes, weight.values.shape)
    weight = _with_groups_for(weight, 1 if inputs is None else mesh.shape[inputs])
    scales_spec = PartitionSpec(inputs if weight.groups > 1 else None, *outputs)
    spec = dataclasses.replace(
        weight,
        values=PartitionSpec(inputs, *outputs),
        scales=scales_spec,
        zero_points=None if weight.zero_points is None else scales_spec,
    )
    return weight, spec


def _batch_axes(leading: tuple[int, ...]) -> list[str | None]:
    """Of activations' leading axes: rows are divided over data, where they can be."""
    return [data_axis(leading[0]), *[None] * (len(leading) - 1)] if leading else []


def _with_groups_for(weight: QuantizedArray, parts: int) -> QuantizedArray:
    """The same weight, its groups split so that each part of the inputs has whole ones."""
    if weight.groups == 1 or weight.groups % parts == 0:
        return weight
    copies = math.lcm(weight.groups, parts) // weight.groups
    repeat = lambda a: None if a is None else jnp.repeat(a, copies, axis=0)
    return dataclasses.replace(
        weight, scales=repeat(weight.scales), zero_points=repeat(weight.zero_points)
    )
