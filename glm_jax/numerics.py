"""Products of float arrays, summed in float32, in the precision that their dtype promises.

A GPU multiplies float32 as TF32 (10 bits of fraction) and a TPU as bfloat16 unless it is asked
not to. Here float32 is float32 on every device. `compute_dtype="tensorfloat32"` asks for the fast
products by name, and so does JAX's own setting `jax_default_matmul_precision`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

TENSORFLOAT32 = "tensorfloat32"
_casts = contextvars.ContextVar("casts", default=False)  # bfloat16 operands to float32


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


@contextlib.contextmanager
def trained_products(compute_dtype: str, on_cpu: bool) -> Iterator[None]:
    """`products_as`, for a program that takes gradients.

    XLA folds transposes of gradients into products, and its CPU has no bfloat16 product with its
    first operand turned: DotThunk says UNIMPLEMENTED when it runs. There the operands are cast to
    float32, which changes no product of them.
    """
    before = _casts.set(on_cpu)
    try:
        with products_as(compute_dtype):
            yield
    finally:
        _casts.reset(before)


def _operands(x: Array, y: Array) -> tuple[Array, Array]:
    if _casts.get() and x.dtype == y.dtype == jnp.bfloat16:
        return x.astype(jnp.float32), y.astype(jnp.float32)
    return x, y


def precision_of(*operands: Array) -> jax.lax.Precision | None:
    """The `precision` argument for a product of these: full for float32, unless
    `jax_default_matmul_precision` asks for another."""
    is_float32 = any(operand.dtype == jnp.float32 for operand in operands)
    if not is_float32 or jax.config.jax_default_matmul_precision is not None:
        return None
    return jax.lax.Precision.HIGHEST


def dot_general(x: Array, y: Array, dimension_numbers: Any) -> Array:
    """`jax.lax.dot_general` with a float32 result."""
    x, y = _operands(x, y)
    return jax.lax.dot_general(
        x,
        y,
        dimension_numbers,
        precision=precision_of(x, y),
        preferred_element_type=jnp.float32,
    )


def einsum(equation: str, x: Array, y: Array) -> Array:
    """`jnp.einsum` of two arrays with a float32 result."""
    x, y = _operands(x, y)
    return jnp.einsum(
        equation, x, y, precision=precision_of(x, y), preferred_element_type=jnp.float32
    )
