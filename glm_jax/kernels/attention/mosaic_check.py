"""Whether mosaic.py's kernels are right on this machine's GPU, before training uses them.

A process of its own compares their output and gradients with those of the formula.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.kernels import self_check, target
from glm_jax.kernels.attention.arguments import Arguments
from glm_jax.kernels.attention.dropout import WeightDropout
from glm_jax.kernels.attention.reference import Reference

_BATCH, _HEADS = 2, 3
Attend = Callable[[Arguments], Array]


def suits(
    device: Any,
    dtype: str,
    head_dim: int,
    has_dropout: bool,
    check: Callable[[str, int], str | None] | None = None,
) -> bool:
    """Return whether a run on GPUs that the kernels take should have them.

    On GPUs of this process their check decides, and a warning says why it failed. For GPUs that
    are only described, which nothing can be checked on, it is True with dropout, which the
    library's kernel has not.

    Args:
      device: of compute capability 9.0.
      dtype, head_dim: of queries, keys and values.
      check: returns a reason, or None where they are right; by default in a process of its own,
        once.
    """
    if device not in jax.devices():
        return has_dropout
    reason = (check or _why_not)(dtype, head_dim)
    if reason is not None:
        warnings.warn(
            f"attention takes another backend than the kernel for compute capability "
            f"{target.WGMMA_CAPABILITY}, which is slower: {reason}",
            stacklevel=2,
        )
    return reason is None


def first_fault(
    attend: Attend,
    dtype: str,
    head_dim: int,
    rates: Sequence[float] = (0.1, 0.0),
    length: int = 456,  # three tiles and a part of one, several blocks of each kind
) -> str | None:
    """Return what is wrong with an output or gradients, None if all equal the formula's.

    Args:
      attend: takes one range of keys a query, with dropout of its weights.
      rates: of dropout.
      length: queries and keys.
    """
    for rate in rates:
        arguments, cotangent = _example(dtype, head_dim, rate, length)
        exact = Reference()
        expected = _with_gradients(exact, _wide(arguments), cotangent.astype(jnp.float32))
        got = _with_gradients(attend, arguments, cotangent)
        names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
        for name, a, b in zip(names, got, expected, strict=True):
            if error := self_check.error_of(a, b, dtype):
                return f"{name}, dropout {rate}: {error}"
    return None


def _why_not(dtype: str, head_dim: int) -> str | None:
    return self_check.why_not(__name__, f"{dtype},{head_dim}")


def _example(dtype: str, head_dim: int, rate: float, length: int) -> tuple[Arguments, Array]:
    """Return a context and a causal part in one row, packed texts and queries that see nothing in
    the other; and the output's gradient."""
    rows, keys = (_BATCH, length, _HEADS, head_dim), (_BATCH, _HEADS, length, head_dim)
    draws = jax.random.split(jax.random.key(0), 4)
    query, key, value, cotangent = (
        jax.random.normal(draw, shape).astype(dtype)
        for draw, shape in zip(draws, (rows, keys, keys, rows), strict=True)
    )
    numbers = jnp.arange(length)
    context, second, none = (length * n // 20 for n in (9, 13, 19))
    prefix = jnp.stack([jnp.zeros_like(numbers), jnp.maximum(numbers + 1, context)], -1)
    starts = jnp.where(numbers < second, 0, second)
    ends = jnp.where(numbers < none, numbers + 1, 0)
    ranges = jnp.stack([prefix, jnp.stack([starts, ends], -1)]).astype(jnp.int32)
    dropout = WeightDropout(jnp.uint32(7), rate) if rate else None
    return Arguments(query, key, value, ranges, dropout), cotangent


def _wide(arguments: Arguments) -> Arguments:
    a = arguments
    query, key, value = (x.astype(jnp.float32) for x in (a.query, a.key, a.value))
    return a.replace(query=query, key=key, value=value)


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(attend: Attend, arguments: Arguments, cotangent: Array) -> tuple[Array, ...]:
    a = arguments
    run = lambda query, key, value: attend(a.replace(query=query, key=key, value=value))
    out, pull_back = jax.vjp(run, a.query, a.key, a.value)
    return (out, *pull_back(cotangent))


def main(arguments: Sequence[str]) -> int:
    """Check a dtype and a size of heads, such as `bfloat16,128`, on the first GPU."""
    from glm_jax.kernels.attention.mosaic import Mosaic

    dtype, head_dim = arguments[0].split(",")
    faults = (first_fault(backend, dtype, int(head_dim)) for backend in (Mosaic(),))
    return self_check.report(target.has_wgmma, str(target.WGMMA_CAPABILITY), faults)


if __name__ == "__main__":
    self_check.run(main)
