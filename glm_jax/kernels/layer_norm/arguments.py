"""What the backends of layer normalisation are called with."""

from typing import Any

from flax import struct


class Arguments(struct.PyTreeNode):
    """The arguments of `api.layer_norm`, as one pytree.

    Attributes:
      x: float [..., embed].
      scale, bias: float [embed].
      epsilon: added to the variance.
    """

    x: Any
    scale: Any
    bias: Any
    epsilon: float = struct.field(pytree_node=False)
