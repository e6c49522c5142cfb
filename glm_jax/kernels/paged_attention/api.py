"""Attention of each row's new queries to keys and values that lie in pages."""

import functools

from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, Shaped

from glm_jax.kernels.dispatch import dispatch
from glm_jax.kernels.paged_attention.arguments import Arguments
from glm_jax.kernels.paged_attention.cpu import CPUPages
from glm_jax.kernels.paged_attention.library_gpu import LibraryGPU
from glm_jax.kernels.paged_attention.library_tpu import LibraryTPU
from glm_jax.kernels.paged_attention.mosaic import MosaicGPU
from glm_jax.kernels.paged_attention.reference import Reference
from glm_jax.kernels.paged_attention.xla import XLA
from glm_jax.sharding import fitting_activation_spec, mesh_to_divide, per_device

_BACKENDS = (CPUPages(), LibraryGPU(), LibraryTPU(), XLA(), Reference())
_BY_NAME = (MosaicGPU(),)  # by its name alone, until it has been measured


def paged_attention(
    query: Float[Array, "batch new heads head_dim"],
    keys: Shaped[Array, "heads pages page_size head_dim"],
    values: Shaped[Array, "heads pages page_size head_dim"],
    tables: Int32[Array, "batch table_size"],
    lengths: Int32[Array, "batch new"],
    key_scales: Float[Array, "heads pages page_size"] | None = None,
    value_scales: Float[Array, "heads pages page_size"] | None = None,
    softmax_dtype: str = "float32",
    implementation: str | None = None,
) -> Float[Array, "batch new heads head_dim"]:
    """Compute softmax(query key^T / sqrt(head_dim)) value over the first `lengths` keys of the
    query's row.

    Under a mesh each device takes its own rows and heads; a row's table then counts the pages
    of its own device.

    Args:
      keys, values: float, or int8 with scales.
      tables: the pages of each row, in order.
      lengths: that grow by one from query to query make the new ones causal; 0 where a row has
        fewer of them than others.
      softmax_dtype: dtype of the scores and their softmax; less than float32 takes the
        formula as it stands.
      implementation: "cpu", "library", "mosaic", "xla" or "reference"; None for the fastest that
        takes the arguments on the platform that is compiled for, "mosaic" apart.

    Returns:
      [batch, new, heads, head_dim] in the query's dtype; zeros for a query of length 0.

    Raises:
      BackendError: the named implementation does not take the arguments here.
    """
    arguments = Arguments(
        query, keys, values, tables, lengths, key_scales, value_scales, softmax_dtype
    )
    backends = _BACKENDS if implementation is None else (*_BACKENDS, *_BY_NAME)
    local = functools.partial(dispatch, "paged attention", backends, implementation=implementation)
    if mesh_to_divide() is None:
        return local(arguments)
    axes = ("batch", "seq", "heads", "head_dim")
    rows, _, heads, _ = fitting_activation_spec(query.shape, axes)
    of_queries, of_pages = PartitionSpec(rows, None, heads), PartitionSpec(heads, rows)
    of_scales = None if key_scales is None else of_pages
    specs = Arguments(
        query=of_queries,
        keys=of_pages,
        values=of_pages,
        tables=PartitionSpec(rows),
        lengths=PartitionSpec(rows),
        key_scales=of_scales,
        value_scales=of_scales,
        softmax_dtype=softmax_dtype,
    )
    return per_device(local, in_specs=(specs,), out_specs=of_queries)(arguments)
