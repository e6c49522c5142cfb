"""Matrix products with float32 sums, in full precision of their operands' dtype.

By default a GPU multiplies float32 as TF32 (10 bits of fraction) and a TPU as bfloat16. Here
float32 is float32 on every device. `compute_dtype="tensorfloat32"` asks for the fast products by
name, and so does JAX's own setting `jax_default_matmul_precision`.
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
FLOAT8 = "float8"
_float8 = contextvars.ContextVar("float8", default=False)
_rounds = contextvars.ContextVar("rounds", default=False)  # see `product_dtype`


def array_dtype(compute_dtype: str) -> str:
    """Return the dtype of arrays for a `compute_dtype`, which may also name a product precision."""
    return "float32" if compute_dtype == TENSORFLOAT32 else compute_dtype


def products_as(compute_dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which traced products have the precision that `compute_dtype` names.

    The gradients of a `jax.custom_vjp` are traced when they are taken: take them in the context
    too.
    """
    if compute_dtype == TENSORFLOAT32:
        return jax.default_matmul_precision(TENSORFLOAT32)
    return contextlib.nullcontext()


@contextlib.contextmanager
def trained_products(
    compute_dtype: str, on_cpu: bool, matmul_precision: str = "default"
) -> Iterator[None]:
    """Enter `products_as` for a program that takes gradients.

    XLA folds the transposes of gradients into products, and its CPU backend has no bfloat16
    product with a transposed first operand: DotThunk reports UNIMPLEMENTED when it runs. On CPU the
    operands are cast to float32, which does not change their products. On other devices
    `product_dtype` is the operands'.

    Args:
      matmul_precision: FLOAT8 for linears in float8.
    """
    before, rounded_before = _casts.set(on_cpu), _rounds.set(not on_cpu)
    float8_before = _float8.set(matmul_precision == FLOAT8)
    try:
        with products_as(compute_dtype):
            yield
    finally:
        _casts.reset(before)
        _rounds.reset(rounded_before)
        _float8.reset(float8_before)


def uses_float8() -> bool:
    """Return True while linears that are traced multiply in float8."""
    return _float8.get()


def product_dtype(x: Array) -> Any:
    """Return the dtype in which a linear gives its product of activations x.

    Float32 outside of `trained_products`. On a GPU a library's product in float32 that is then
    rounded passes over memory three times instead of once; sums are in float32 in any case.
    """
    return x.dtype if _rounds.get() else jnp.dtype(jnp.float32)


def _operands(x: Array, y: Array) -> tuple[Array, Array]:
    if _casts.get() and x.dtype == y.dtype == jnp.bfloat16:
        return x.astype(jnp.float32), y.astype(jnp.float32)
    return x, y


def precision_of(*operands: Array) -> jax.lax.Precision | None:
    """Return the `precision` argument for a product of some operands.

    Full precision for float32, unless `jax_default_matmul_precision` sets another.
    """
    is_float32 = any(operand.dtype == jnp.float32 for operand in operands)
    if not is_float32 or jax.config.jax_default_matmul_precision is not None:
        return None
    return jax.lax.Precision.HIGHEST


def dot_general(x: Array, y: Array, dimension_numbers: Any, dtype: Any = jnp.float32) -> Array:
    """Compute `jax.lax.dot_general` with sums in float32, rounded once to `dtype`."""
    x, y = _operands(x, y)
    return jax.lax.dot_general(
        x,
        y,
        dimension_numbers,
        precision=precision_of(x, y),
        preferred_element_type=dtype,
    )


def einsum(equation: str, x: Array, y: Array, dtype: Any = jnp.float32) -> Array:
    """Compute `jnp.einsum` of two arrays with sums in float32, rounded once to `dtype`."""
    x, y = _operands(x, y)
    return jnp.einsum(equation, x, y, precision=precision_of(x, y), preferred_element_type=dtype)
