"""What the backends of attention over pages are called with."""

from typing import Any

from flax import struct


class Arguments(struct.PyTreeNode):
    """The arguments of `api.paged_attention`, as one pytree.

    Attributes:
      query: float [batch, heads, head_dim].
      keys, values: [heads, pages, page_size, head_dim], float, or int8 with scales.
      tables: int32 [batch, table_size], the pages of each row in order.
      lengths: int32 [batch], keys of each row.
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
