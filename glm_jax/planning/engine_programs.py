"""The engine's programs lowered for devices that are not here, with the engine's own shapes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm_jax.config import GLMConfig
from glm_jax.engine import step_functions
from glm_jax.engine.page_pool import PAGE_SIZE, cache_pages, page_count, table_size
from glm_jax.engine.prefill_batch import make_prefill_batch
from glm_jax.engine.scoring import log_probabilities
from glm_jax.engine.slots import empty_slot, empty_slots
from glm_jax.kernels.quantized_matmul import mosaic_check
from glm_jax.model import gpu_layout
from glm_jax.model import params as glm_params
from glm_jax.model.abstract_params import abstract_quantized
from glm_jax.model.layer_stacks import as_layers, described_apart
from glm_jax.model.paged_cache import PAGE_AXES, init_paged_cache
from glm_jax.model.params import GLMParams
from glm_jax.model.streamed_layers import (
    DEVICE_MEMORY,
    HOST_MEMORY,
    OffloadedLayers,
    device_bytes,
    is_streamed,
    resident_count,
)
from glm_jax.planning.topology import compiling_for, in_memory
from glm_jax.quantization import Scheme
from glm_jax.sharding import activation_sharding, replicated, row_shards


def lower_engine(
    config: GLMConfig,
    mesh: Mesh,
    quantization: str | None,
    *,
    slots: int,
    prefill_width: int,
    max_length: int | None = None,
    weight_memory_limit: float | None = None,
) -> dict[str, Any]:
    """Lower a decode step of all slots and a prefill through all layers.

    Args:
      quantization: of the weights, see `Scheme.parse`; None for floats.
      slots: requests that run together, each with pages for `max_length` tokens.
      prefill_width: tokens of a prefill batch.
      max_length: tokens of a request, the model's positions by default.
      weight_memory_limit: see `abstract_params`.

    Returns:
      Lowered programs under the names "step" and "prefill".
    """
    length = max_length or config.max_sequence_length
    shards = row_shards(mesh)
    params = abstract_params(config, mesh, quantization, weight_memory_limit)
    is_apart = as_layers(params.layers).is_apart
    cache, pages = abstract_cache(config, mesh, slots, length, is_apart)
    pages_a_layer = 0 if is_apart else pages
    row = empty_slot(config, length, table_size(length))
    described = jax.tree.map(
        lambda x: _sharded(mesh, x, ("batch", *(None,) * (x.ndim - 1))),
        jax.eval_shape(lambda: empty_slots(row, slots, None)),
    )
    batch = make_prefill_batch([], shards, prefill_width, PAGE_SIZE, pages_a_layer, 0)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), batch
    )
    hidden = jax.ShapeDtypeStruct(
        (shards, prefill_width, config.hidden_size), config.activation_dtype
    )
    x = _sharded(mesh, hidden, ("batch", "seq", "embed"))
    bounds = {"first": np.int32(0), "end": np.int32(config.num_layers)}
    if as_layers(params.layers).is_streamed:
        described, cache, batch, x = in_memory((described, cache, batch, x), DEVICE_MEMORY)
    with compiling_for(mesh):
        step = step_functions.step.lower(params, config, described, cache, pages_a_layer)
        prefill = step_functions.prefill_layers.lower(
            params.layers, config, x, batch, cache, **bounds
        )
        return {"step": step, "prefill": prefill}


def lower_scoring(
    config: GLMConfig, mesh: Mesh, quantization: str | None, *, rows: int, length: int
) -> Any:
    """Lower the program that scores `rows` rows of `length` tokens.

    Args:
      quantization: see `lower_engine`.
    """
    params = abstract_params(config, mesh, quantization)
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(mesh))
    with compiling_for(mesh):
        return log_probabilities.lower(
            params,
            config,
            tokens=integers(rows, length),
            position_ids=integers(rows, length),
            key_ranges=integers(rows, length, 4),
            indices=integers(rows, length),
            targets=integers(rows, length),
        )


def abstract_cache(
    config: GLMConfig, mesh: Mesh, slots: int, length: int, is_apart: bool = True
) -> tuple[Any, int]:
    """Describe a paged cache with room for `slots` requests of `length` tokens.

    Args:
      is_apart: a cache for each layer, as for layers that are a tuple.

    Returns:
      The cache, and the number of pages of a layer and device.
    """
    shards = row_shards(mesh)
    all_slots = -(-slots // shards) * shards
    pages = cache_pages(all_slots * page_count(length) * PAGE_SIZE, length, shards)
    cache = jax.eval_shape(lambda: init_paged_cache(config, pages * shards, PAGE_SIZE, is_apart))
    return jax.tree.map(lambda x: _sharded(mesh, x, PAGE_AXES[: x.ndim]), cache), pages


def _sharded(mesh: Mesh, x: jax.ShapeDtypeStruct, axes: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=activation_sharding(mesh, axes))


def abstract_params(
    config: GLMConfig,
    mesh: Mesh,
    quantization: str | None,
    weight_memory_limit: float | None = None,
    is_stacked: bool = False,
) -> GLMParams:
    """Return shapes, dtypes and shardings of parameters as `restore` loads them on GPUs or TPUs.

    Args:
      quantization: see `lower_engine`.
      weight_memory_limit: GiB of weights on a device; blocks beyond it are in hosts' memory.
      is_stacked: layers stacked; without a limit.

    Raises:
      OffloadError: the limit leaves no room for two blocks.
    """
    if quantization is None:
        params = glm_params.abstract(config, mesh)
    else:
        params = abstract_quantized(config, mesh, Scheme.parse(quantization).format)
    is_laid_out = mosaic_check.is_for(mesh.devices.flat[0])
    if is_stacked:
        return gpu_layout.describe_stack(params, mesh) if is_laid_out else params
    layers: Any = params.layers
    whole = described_apart(params)
    apart: Any = whole.layers
    if is_laid_out:
        whole = gpu_layout.describe(whole, mesh)
    if weight_memory_limit is None:
        return whole
    rest = device_bytes(params) - device_bytes(layers)
    count = resident_count(rest, layers, config.num_layers, weight_memory_limit)
    if count == config.num_layers:
        return whole
    resident = in_memory(apart[:count], DEVICE_MEMORY)
    streamed = jax.tree.map(
        lambda x: in_memory(x, HOST_MEMORY if is_streamed(x) else DEVICE_MEMORY),
        _with_count(layers, config.num_layers - count),
    )
    on_device: GLMParams = in_memory(params, DEVICE_MEMORY)
    return dataclasses.replace(on_device, layers=OffloadedLayers(resident, streamed))


def _with_count(layers: Any, count: int) -> Any:
    """Describe stacked layers of another number."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=x.sharding), layers
    )
