"""What the backends of AdamW are called with."""

from typing import Any

from flax import struct


class Arguments(struct.PyTreeNode):
    """The arguments of `api.adamw`, as one pytree.

    Attributes:
      param, gradient, first, second: float32, all of one shape.
      factor: float32 [], what the gradient is multiplied by before.
      rate: float32 [], learning rate.
      corrections: float32 [2], 1 - beta ** step of both moments.
      is_good: bool [], False to change nothing.
      beta1, beta2, epsilon: of Adam.
      decay: the weight decay; 0 for none.
    """

    param: Any
    gradient: Any
    first: Any
    second: Any
    factor: Any
    rate: Any
    corrections: Any
    is_good: Any
    beta1: float = struct.field(pytree_node=False)
    beta2: float = struct.field(pytree_node=False)
    epsilon: float = struct.field(pytree_node=False)
    decay: float = struct.field(pytree_node=False)
