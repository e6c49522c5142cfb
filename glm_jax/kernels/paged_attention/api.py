"""Chooses how a query attends to keys and values that lie in pages."""

import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, Shaped

from glm_jax.kernels.attention import cpu
from glm_jax.kernels.paged_attention import library_gpu, library_tpu, reference, xla
from glm_jax.sharding import fitting_activation_spec, mesh_to_divide


def paged_attention(
    query: Float[Array, "batch heads head_dim"],
    keys: Shaped[Array, "heads pages page_size head_dim"],
    values: Shaped[Array, "heads pages page_size head_dim"],
    tables: Int32[Array, "batch table_size"],
    lengths: Int32[Array, " batch"],
    key_scales: Float[Array, "heads pages page_size"] | None = None,
    value_scales: Float[Array, "heads pages page_size"] | None = None,
    softmax_dtype: str = "float32",
) -> Float[Array, "batch heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value over the first `lengths` keys of each row.

    Under a mesh each device takes its own rows and heads; a row's table then counts the pages
    of its own device.

    Args:
      keys, values: float, or int8 with scales.
      tables: the pages of each row, in order.
      softmax_dtype: dtype of the scores and their softmax; less than float32 takes the
        formula as it stands.

    Returns:
      [batch, heads, head_dim] in the query's dtype; zeros for a row of length 0.
    """
    scales = (key_scales, value_scales)
    local = _local
    if softmax_dtype != "float32":
        local = functools.partial(reference.paged_attention, softmax_dtype=softmax_dtype)
    if mesh_to_divide() is None:
        return local(query, keys, values, tables, lengths, *scales)
    rows, heads, _ = fitting_activation_spec(query.shape, ("batch", "heads", "head_dim"))
    of_pages = PartitionSpec(heads, rows)
    of_scales = None if key_scales is None else of_pages
    run: Any = functools.partial(jax.shard_map, check_vma=False)
    attended: Array = run(
        local,
        in_specs=(
            PartitionSpec(rows, heads),
            of_pages,
            of_pages,
            PartitionSpec(rows),
            PartitionSpec(rows),
            of_scales,
            of_scales,
        ),
        out_specs=PartitionSpec(rows, heads),
    )(query, keys, values, tables, lengths, *scales)
    return attended


def _local(query: Array, keys: Array, values: Array, *rest: Any) -> Array:
    backends: dict[str, Any] = {"default": xla.paged_attention}
    if cpu.takes_pages(query, keys):
        backends["cpu"] = cpu.paged_attention
    if library_gpu.is_available(query, keys, rest[0]):
        backends["cuda"] = library_gpu.paged_attention
    if library_tpu.is_available(query, keys):
        backends["tpu"] = library_tpu.paged_attention
    attended: Array = jax.lax.platform_dependent(query, keys, values, *rest, **backends)
    return attended
