"""Products of float arrays, summed in float32, in the precision that their dtype promises.

A GPU multiplies float32 as TF32 (10 bits of fraction) and a TPU as bfloat16 unless it is asked
not to. Here float32 is float32 on every device. `compute_dtype="tensorfloat32"` asks for the fast
products by name, and so does JAX's own setting `jax_default_matmul_precision`.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

TENSORFLOAT32 = "tensorfloat32"


def array_dtype(compute_dtype: str) -> str:
    """The dtype of the arrays behind a name that also says how they are multiplied."""
    return "float32" if compute_dtype == TENSORFLOAT32 else compute_dtype


def products_as(compute_dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Within it, products that are traced have the precision that `compute_dtype` names.

    Gradients that a `jax.custom_vjp` computes are traced when they are taken: take them within
    it too.
    """
    if compute_dtype == TENSORFLOAT32:
        return jax.default_matmul_precision(TENSORFLOAT32)
    return contextlib.nullcontext()


def precision_of(*operands: Array) -> jax.lax.Precision | None:
    """The `precision` argument for a product of these: full for float32, unless
    `jax_default_matmul_precision` asks for another."""
    is_float32 = any(operand.dtype == jnp.float32 for operand in operands)
    if not is_float32 or jax.config.jax_default_matmul_precision is not None:
        return None
    return jax.lax.Precision.HIGHEST


def dot_general(x: Array, y: Array, dimension_numbers: Any) -> Array:
    """`jax.lax.dot_general` with a float32 result."""
    return jax.lax.dot_general(
        x,
        y,
        dimension_numbers,
        precision=precision_of(x, y),
        preferred_element_type=jnp.float32,
    )


def einsum(equation: str, x: Array, y: Array) -> Array:
    """`jnp.einsum` of two arrays with a float32 result."""
    return jnp.einsum(
        equation, x, y, precision=precision_of(x, y), preferred_element_type=jnp.float32
    )
