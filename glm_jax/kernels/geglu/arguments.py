"""What the backends of GeGLU are called with."""

from typing import Any

from flax import struct


class Arguments(struct.PyTreeNode):
    """The arguments of `api.geglu`, as one pytree.

    Attributes:
      hidden: float [..., 2, mlp], the two halves: what is multiplied, and the gate.
    """

    hidden: Any
