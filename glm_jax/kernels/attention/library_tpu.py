"""Attention on TPUs by JAX's splash attention."""

import dataclasses
import functools
import importlib

import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.kernels.attention.arguments import Arguments, on_each_device
from glm_jax.kernels.dispatch import unmet

_FEWEST_QUERIES = 128  # of a block
_MAX_KEYS = 2**15  # a range is two halves of an int32
_HEAD_DIMS = (64, 128)


@dataclasses.dataclass(frozen=True)
class LibraryTPU:
    """Takes one range of keys a query, without dropout.

    Attributes:
      interpret: simulates the kernel on any device, for tests.
    """

    interpret: bool = False
    name: str = "library"

    @property
    def platform(self) -> str | None:
        return None if self.interpret else "tpu"

    def supports(self, arguments: Arguments) -> str | None:
        a = arguments
        return unmet(
            (a.has_one_range, "one range of keys a query"),
            (a.softmax_dtype == "float32", "a softmax in float32"),
            (a.dropout is None, "no dropout"),
            # Its products of float32 are not float32's on a TPU.
            (self.interpret or a.query.dtype == jnp.bfloat16, "bfloat16"),
            (a.query.dtype == a.key.dtype == a.value.dtype, "one dtype"),
            (a.query.shape[-1] in _HEAD_DIMS, "heads of 64 or 128 numbers"),
            (a.query.shape[1] >= _FEWEST_QUERIES, f"{_FEWEST_QUERIES} queries and more"),
            (a.key.shape[2] <= _MAX_KEYS, f"at most {_MAX_KEYS} keys"),
        )

    def __call__(self, arguments: Arguments) -> Array:
        # Importing it takes long, and programs for other devices do not use it.
        splash = importlib.import_module("glm_jax.kernels.attention.splash")
        return on_each_device(functools.partial(splash.attend, self.interpret), arguments)
