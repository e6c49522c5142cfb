"""A product whose weight is divided among the devices of a mesh."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from glm_jax.quantization import QuantizedArray
from glm_jax.sharding import parameter_spec

Product = Callable[[Array, QuantizedArray, Array | None], Array]


def applies(weight: QuantizedArray) -> bool:
    """Whether a mesh surrounds the call whose devices are not yet apart, and how the weight
    lies on it is known."""
    mesh = jax.sharding.get_abstract_mesh()
    return weight.axes is not None and mesh.size > 1 and not mesh.manual_axes


def matmul(
    product: Product,
    x: Float[Array, "..."],
    weight: QuantizedArray,
    bias: Float[Array, "..."] | None,
) -> Float[Array, "..."]:
    """x [..., K] times weight [K, *outputs] plus bias, each device with what it holds.

    The weight stays where it is. x is given to all devices that hold other parts of the
    weight, with the inputs that theirs has; where these divide the inputs, results are
    summed over them. Rows are divided over the data axis alone.

    Args:
      product: multiplies on one device.

    Returns:
      float32 [..., *outputs], outputs divided as the weight's are.
    """
    assert weight.axes is not None
    mesh = jax.sharding.get_abstract_mesh()
    inputs, *outputs = parameter_spec(mesh.shape, weight.axes, weight.values.shape)
    weight = _with_groups_for(weight, 1 if inputs is None else mesh.shape[inputs])
    group_axis = inputs if weight.groups > 1 else None
    values_spec = PartitionSpec(inputs, *outputs)
    scales_spec = PartitionSpec(group_axis, *outputs)
    weight_spec = weight.replace(  # type: ignore[attr-defined]
        values=values_spec,
        scales=scales_spec,
        zero_points=None if weight.zero_points is None else scales_spec,
    )
    batch = [None] * (x.ndim - 1)
    if batch and "data" in mesh.shape and x.shape[0] % mesh.shape["data"] == 0:
        batch[0] = "data"  # type: ignore[call-overload]

    def local(x: Array, weight: QuantizedArray, bias: Array | None) -> Array:
        if inputs is None:
            return product(x, weight, bias)
        total = jax.lax.psum(product(x, weight, None), inputs)
        return total if bias is None else total + bias.astype(jnp.float32)

    run: Any = functools.partial(jax.shard_map, check_vma=False)
    divided: Array = run(
        local,
        in_specs=(
            PartitionSpec(*batch, inputs),
            weight_spec,
            None if bias is None else PartitionSpec(*outputs),
        ),
        out_specs=PartitionSpec(*batch, *outputs),
    )(x, weight, bias)
    return divided


def _with_groups_for(weight: QuantizedArray, parts: int) -> QuantizedArray:
    """The same weight, its groups split so that each part of the inputs has whole ones."""
    if weight.groups == 1 or weight.groups % parts == 0:
        return weight
    copies = math.lcm(weight.groups, parts) // weight.groups
    repeat = lambda a: None if a is None else jnp.repeat(a, copies, axis=0)
    split: QuantizedArray = weight.replace(  # type: ignore[attr-defined]
        scales=repeat(weight.scales), zero_points=repeat(weight.zero_points)
    )
    return split
