"""Attention for training on NVIDIA GPUs of compute capability 9.0 (Pallas, Mosaic GPU)."""

import dataclasses
import functools
import importlib

import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.kernels import target
from glm_jax.kernels.attention.arguments import Arguments, on_each_device
from glm_jax.kernels.attention.dropout import line_hashes
from glm_jax.kernels.dispatch import unmet

_HEAD_DIMS = (64, 128)


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """Takes one range of keys a query, in float16 or bfloat16, with dropout and gradients.

    Attributes:
      key_block: keys of a block that the forward kernel reads at once, a multiple of 64.
      interpret: simulates the kernels on any device, for tests.
    """

    key_block: int = 128
    interpret: bool = False
    name: str = "mosaic"

    @property
    def platform(self) -> str | None:
        return None if self.interpret else "cuda"

    def supports(self, arguments: Arguments) -> str | None:
        a = arguments
        return unmet(
            (a.has_one_range, "one range of keys a query"),
            (a.softmax_dtype == "float32", "a softmax in float32"),
            (a.query.dtype in (jnp.float16, jnp.bfloat16), "float16 or bfloat16"),
            (a.query.dtype == a.key.dtype == a.value.dtype, "one dtype"),
            (a.query.shape[-1] in _HEAD_DIMS, "heads of 64 or 128 numbers"),
            target.requires_mosaic_gpu(),
            *(() if self.interpret else (target.requires_wgmma(),)),
        )

    def __call__(self, arguments: Arguments) -> Array:
        dropout = arguments.dropout
        batch, queries, heads, _ = arguments.query.shape
        if dropout is None:
            lines = None
        else:
            # Of the whole array: a device's rows and heads are part of it.
            lines = line_hashes(dropout, batch, heads, jnp.arange(queries))
            dropout = dropout.replace(seed=None)
        # Importing Mosaic takes long, and few programs use it.
        kernels = importlib.import_module("glm_jax.kernels.attention.mosaic_kernels")
        static = kernels.Static(self.key_block, self.interpret, dropout)
        local = functools.partial(kernels.on_one_device, static)
        return on_each_device(local, arguments.replace(dropout=None), lines)
