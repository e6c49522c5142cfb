"""What the backends of attention over pages are called with."""

from typing import Any

import jax.numpy as jnp
from flax import struct


class Arguments(struct.PyTreeNode):
    """The arguments of `api.paged_attention`, as one pytree.

    Attributes:
      query: float [batch, new, heads, head_dim].
      keys, values: [heads, pages, page_size, head_dim], float, or int8 with scales.
      tables: int32 [batch, table_size], the pages of each row in order.
      lengths: int32 [batch, new], keys that each query sees; 0 for none.
      key_scales, value_scales: float32 [heads, pages, page_size], or None.
      softmax_dtype: dtype of the scores and their softmax.
    """

    query: Any  # or what jax puts in its place while it transforms a function
    keys: Any
    values: Any
    tables: Any
    lengths: Any
    key_scales: Any = None
    value_scales: Any = None
    softmax_dtype: str = struct.field(pytree_node=False, default="float32")


def with_single_queries(arguments: Arguments) -> Arguments:
    """Return the same attention with a row for each query, for kernels that take one a row.

    Its query is [batch * new, heads, head_dim], its lengths [batch * new].
    """
    a = arguments
    return a.replace(
        query=a.query.reshape(-1, *a.query.shape[2:]),
        tables=jnp.repeat(a.tables, a.query.shape[1], axis=0),
        lengths=a.lengths.reshape(-1),
    )
