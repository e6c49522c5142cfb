"""Attention over pages on GPUs of compute capability 9.0, by our own kernel (`mosaic_gpu.py`)."""

import dataclasses
import importlib
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.kernels import target
from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.paged_attention.arguments import Arguments

QUERIES = 64  # of a row: rows of wgmma's operand
HEAD_DIM = 128
PAGE = 64


@dataclasses.dataclass(frozen=True)
class MosaicGPU:
    """Takes pages of 64 keys and heads of 128 numbers, and up to 64 new queries a row.

    Attributes:
      interpret: runs the kernel's program step by step on any device, for tests.
    """

    name: str = "mosaic"
    platform: str | None = "cuda"
    interpret: bool = False

    def supports(self, arguments: Arguments) -> str | None:
        query, keys = arguments.query, arguments.keys
        return unmet(
            (arguments.softmax_dtype == "float32", "a softmax in float32"),
            (query.dtype in (jnp.float16, jnp.bfloat16), "queries in float16 or bfloat16"),
            (keys.dtype in (query.dtype, jnp.int8), "keys in the query's dtype or int8"),
            (keys.shape[3] == HEAD_DIM, f"heads of {HEAD_DIM} numbers"),
            (keys.shape[2] == PAGE, f"pages of {PAGE} keys"),
            (query.shape[1] <= QUERIES, f"up to {QUERIES} queries a row"),
            target.requires_mosaic_gpu(),
            *(() if self.interpret else (target.requires_wgmma(),)),
        )

    def __call__(self, arguments: Arguments) -> Array:
        # Not every JAX that runs elsewhere can import what it is written in.
        kernel: Any = importlib.import_module("glm_jax.kernels.paged_attention.mosaic_gpu")
        attended: Array = kernel.attention(arguments, self.interpret)
        return attended
