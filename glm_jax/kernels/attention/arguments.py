"""What attention's backends are called with."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array

from glm_jax.kernels.attention.dropout import WeightDropout
from glm_jax.sharding import fitting_activation_spec, mesh_to_divide, per_device

SAVED = "attention"


def saved(*results: Array) -> tuple[Array, ...]:
    """Name results of a forward rule `SAVED`, for policies of `jax.checkpoint`.

    Where these are saved, the backward pass does not run the forward kernel again.
    """
    return tuple(checkpoint_name(x, SAVED) for x in results)


class Arguments(struct.PyTreeNode):
    """The arguments of `api.attention`, as one pytree.

    Attributes:
      query: float [batch, query, heads, head_dim].
      key, value: float [batch, heads, key, head_dim].
      visible: int32 [batch, query, 2 or 4], [start, end) of one or two ranges of keys for each
        query; or bool [batch, query, key], true where the query may see the key.
      dropout: of the softmax's weights; None for none.
      softmax_dtype: dtype of the scores and their softmax.
    """

    query: Any  # or what jax puts in its place while it transforms a function
    key: Any
    value: Any
    visible: Any
    dropout: WeightDropout | None = None
    softmax_dtype: str = struct.field(pytree_node=False, default="float32")

    @property
    def has_ranges(self) -> bool:
        """Whether `visible` holds ranges, not a mask."""
        return bool(self.visible.dtype != bool)

    @property
    def has_one_range(self) -> bool:
        """Whether `visible` holds one range for each query."""
        return self.has_ranges and self.visible.shape[-1] == 2


def padded(x: Array, axis: int, multiple: int) -> Array:
    """Append zeros to an axis, up to the next multiple of a size."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, width)


def on_each_device(
    function: Callable[..., Array], arguments: Arguments, *of_queries: Array | None
) -> Array:
    """Call `function` under a mesh with each device's own rows and heads.

    Args:
      function: attends on one device; takes arguments without dropout, and what follows
        them here.
      of_queries: further arrays [batch, heads, query].
    """
    if mesh_to_divide() is None:
        return function(arguments, *of_queries)
    axes = ("batch", "seq", "heads", "head_dim")
    batch, _, heads, _ = fitting_activation_spec(arguments.query.shape, axes)
    by_head, query = PartitionSpec(batch, heads), PartitionSpec(batch, None, heads)
    specs = arguments.replace(query=query, key=by_head, value=by_head, visible=PartitionSpec(batch))
    more = tuple(None if x is None else by_head for x in of_queries)
    run = per_device(function, in_specs=(specs, *more), out_specs=query)
    divided: Array = run(arguments, *of_queries)
    return divided
