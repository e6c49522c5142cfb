"""Lays weights out for the kernel for compute capability 9.0, on the devices that they are on."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.kernels.dispatch import BackendError
from glm_jax.kernels.quantized_matmul import sharded
from glm_jax.kernels.quantized_matmul.arguments import INTEGERS
from glm_jax.kernels.quantized_matmul.mosaic_blocks import supports
from glm_jax.kernels.quantized_matmul.mosaic_layout import (
    TILE,
    MosaicArray,
    count_outer,
    lay_out,
)
from glm_jax.quantization import QuantizedArray
from glm_jax.sharding import on_mesh, per_device


def prepare(weight: Any, mesh: Mesh | None = None, is_stacked: bool = False) -> MosaicArray:
    """Lay a quantised weight [K, *outputs] out, each device its own part of it.

    Args:
      mesh: that it is divided over, by its logical axes.
      is_stacked: of several layers, all arrays with a leading axis; so are the result's.

    Raises:
      BackendError: the kernel does not take the weight, or not a device's part of it.
    """
    with on_mesh(mesh):
        laid_out: MosaicArray = (_lay_out_stack if is_stacked else _lay_out)(_checked(weight))
    return laid_out


def describe(weight: Any, mesh: Mesh) -> MosaicArray:
    """Describe what `prepare` returns of a weight that is described.

    Raises:
      BackendError: as `prepare`.
    """
    with on_mesh(mesh):
        shapes = jax.eval_shape(_lay_out, _checked(weight))
        _, specs, _ = sharded.divide(shapes)

    def described(x: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(described, shapes, specs)


@jax.jit
def _lay_out(weight: QuantizedArray) -> MosaicArray:
    """Reasons against it are found while this is traced."""
    if math.prod(weight.shape[1:]) % TILE:
        raise _not_taken(f"its outputs, {list(weight.shape[1:])}, are no multiple of {TILE}")
    part = functools.partial(_lay_out_part, outer=count_outer(weight.shape[1:]))
    if not sharded.applies(weight):
        return part(weight)
    weight, stored, (inputs, *outputs) = sharded.divide(weight)
    if any(outputs[count_outer(weight.shape[1:]) + 1 :]):
        raise _not_taken(f"its outputs, {list(weight.shape[1:])}, are divided within tiles")
    own = sharded.specs_of_tiles(weight, inputs, outputs)
    laid_out: MosaicArray = per_device(part, in_specs=(stored,), out_specs=own)(weight)
    return laid_out


@jax.jit
def _lay_out_stack(stack: QuantizedArray) -> MosaicArray:
    """Return a layer at a time: all at once would take several times their bytes."""
    laid_out: MosaicArray = jax.lax.map(_lay_out, stack)
    return laid_out


def _lay_out_part(weight: QuantizedArray, outer: int) -> MosaicArray:
    outputs = weight.shape[1:]
    reason = supports(weight, jnp.float16)
    if reason is None and math.prod(outputs[outer:]) % TILE:
        reason = f"a device's outputs, {list(outputs)}, are no multiple of {TILE}"
    if reason is not None:
        raise _not_taken(reason)
    return lay_out(weight)


def _not_taken(reason: str) -> BackendError:
    return BackendError(f"quantized_matmul: mosaic does not take the weight: {reason}")


def _checked(weight: Any) -> QuantizedArray:
    if not isinstance(weight, QuantizedArray):
        raise BackendError(
            f"quantized_matmul: expected a quantised weight as it is stored to lay out for "
            f"mosaic, got {type(weight).__name__}"
        )
    if weight.stored_dtype not in INTEGERS:
        raise _not_taken(f"it is {weight.stored_dtype}")
    return weight
