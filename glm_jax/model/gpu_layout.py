"""A quantised model's linears in the layout of the kernels for compute capability 8.0 to 9.0."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from glm_jax import processes
from glm_jax.errors import UserError
from glm_jax.kernels.dispatch import BackendError
from glm_jax.kernels.quantized_matmul import mosaic_check, mosaic_prepare
from glm_jax.kernels.quantized_matmul.mosaic_check import Kind
from glm_jax.model.layer_stacks import described_apart, described_stack, map_linears
from glm_jax.model.params import GLMParams, LayerParams, LinearParams, map_layer_linears
from glm_jax.quantization import QuantizedArray
from glm_jax.sharding import mesh_of

VARIABLE = "GLM_JAX_QUANTIZED_LAYOUT"
_DTYPES = ("float16", "bfloat16")  # of activations that the kernel takes; scales have the same
Check = Callable[[frozenset[Kind]], str | None]


class LayoutError(UserError):
    """A layout that does not exist."""


def lay_out(params: GLMParams, donate: bool = False, why_not: Check | None = None) -> GLMParams:
    """Lay the quantised linears of unstacked layers out, one after another.

    They stay as they are stored, and a warning says why, where the kernel fails its check, where
    there is no memory for both forms, or where a device's part has no whole tiles; without a
    warning where the variable GLM_JAX_QUANTIZED_LAYOUT is "stored".

    Args:
      donate: delete a weight as stored when it is laid out.
      why_not: checks the kernel; `mosaic_check.why_not` by default.

    Raises:
      LayoutError: the variable has another value.
    """
    weights = list(_quantized(params.layers))
    if not weights or _is_turned_off():
        return params
    mesh = mesh_of(weights)
    kinds = frozenset(_kind_of_a_part(weight) for weight in weights)
    reason = None if donate else _missing_memory(weights)
    if reason is None:
        reason = (why_not or mosaic_check.why_not)(kinds)
    if reason is not None:
        _warn(reason)
        return params

    def place(weight: Any) -> Any:
        laid_out = _placed(weight, mesh)
        if donate and laid_out is not weight:
            weight.values.delete()  # the scales may be the same arrays as before
        return laid_out

    return _map_weights(place, params)


def layout_of_parts(mesh: Mesh) -> Callable[[LayerParams], LayerParams] | None:
    """Return what lays a model out while `restore` reads it, None where devices are for none."""
    return lay_out_stack if mosaic_check.is_for(mesh.devices.flat[0]) else None


def lay_out_stack(layers: LayerParams) -> LayerParams:
    """Lay the quantised linears of stacked layers out; reasons against it are those of `lay_out`.

    Beside the layers there must be room for them once more.

    Raises:
      LayoutError: the variable GLM_JAX_QUANTIZED_LAYOUT has a value that does not exist.
    """
    weights = list(_quantized(layers))
    if not weights or _is_turned_off():
        return layers
    kinds = frozenset(_kind_of_a_part(weight, is_stacked=True) for weight in weights)
    reason = mosaic_check.why_not(kinds)
    if reason is not None:
        _warn(reason)
        return layers
    place = functools.partial(_placed, mesh=mesh_of(weights), is_stacked=True)
    return map_layer_linears(_change_by(place), layers)


def _placed(weight: Any, mesh: Mesh | None, is_stacked: bool = False) -> Any:
    """Lay a weight out; one that is not taken stays as it is."""
    if not _is_taken(weight):
        return weight
    try:
        return mosaic_prepare.prepare(weight, mesh, is_stacked)
    except BackendError as error:
        _warn(str(error))
        return weight


def describe_stack(params: GLMParams, mesh: Mesh) -> GLMParams:
    """Describe what `lay_out_stack` makes of layers that are described; see `describe`."""
    apart = described_apart(params)
    layers: Any = apart.layers
    [layer] = describe(dataclasses.replace(apart, layers=layers[:1]), mesh).layers
    return dataclasses.replace(params, layers=described_stack(layer, len(layers)))


def describe(params: GLMParams, mesh: Mesh) -> GLMParams:
    """Describe what `lay_out` returns of parameters that are described, as the kernel is right."""

    def place(weight: Any) -> Any:
        try:
            return mosaic_prepare.describe(weight, mesh) if _is_taken(weight) else weight
        except BackendError:
            return weight

    return _map_weights(place, params)


def _map_weights(layout: Callable[[Any], Any], params: GLMParams) -> GLMParams:
    return map_linears(_change_by(layout), params)


def _change_by(layout: Callable[[Any], Any]) -> Callable[[str, LinearParams], LinearParams]:
    return lambda _, linear: LinearParams(linear.weight.laid_out(layout), linear.bias)


def _quantized(layers: Any) -> Iterator[QuantizedArray]:
    """Return the weights that can be laid out."""
    is_weight = lambda leaf: isinstance(leaf, QuantizedArray)
    leaves = jax.tree.leaves(layers, is_leaf=is_weight)
    return filter(_is_taken, leaves)


def _is_taken(weight: Any) -> bool:
    return isinstance(weight, QuantizedArray) and str(weight.scales.dtype) in _DTYPES


def _kind_of_a_part(weight: QuantizedArray, is_stacked: bool = False) -> Kind:
    """Of a device's own part of a weight, of one layer's where they are stacked."""

    def part(x: jax.Array) -> jax.ShapeDtypeStruct:
        own = x.sharding.shard_shape(x.shape)
        return jax.ShapeDtypeStruct(own[1:] if is_stacked else own, x.dtype)

    return Kind.of(jax.tree.map(part, weight))


def _is_turned_off() -> bool:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "stored"):
        raise LayoutError(f"{VARIABLE}={value}: expected stored, or leave it unset")
    return value == "stored"


def _missing_memory(weights: list[QuantizedArray]) -> str | None:
    """Return why there is no memory for a second copy of the weights, None if there is."""
    shards = [weight.values.addressable_shards[0] for weight in weights]
    statistics = _statistics(shards[0].device)
    needed = sum(shard.data.nbytes for shard in shards)
    free = statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)
    fits = not statistics or needed + max(s.data.nbytes for s in shards) * 4 < free
    if processes.agree(float(fits)):
        return None
    return (
        f"{needed / 2**30:.1f} GiB of weights laid out beside those as stored are too many for "
        "this device; prepare(params, donate=True) replaces them one by one"
    )


def _statistics(device: Any) -> dict[str, int]:
    """Bytes in use of a device, and its limit; nothing where it counts none."""
    return device.memory_stats() or {}


def _warn(reason: str) -> None:
    warnings.warn(
        f"quantised weights stay as they are stored, and products are slower: {reason}",
        stacklevel=4,
    )
