"""Cross-entropy over the vocabulary in chunks of positions, fused with its gradient.

Logits of all positions at once would be the largest array of a step: 1.2 GB for a sequence of
2048 positions and 150528 entries in float32. A chunk's logits give its losses and its part of the
gradients together, so that nothing is computed twice.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glm_jax.model.training import TABLE_AXES, whole_table
from glm_jax.numerics import einsum, product_dtype
from glm_jax.sharding import constrain, constrain_parameters, is_for_cpu

Sums = tuple[Float[Array, ""], tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: Float[Array, "batch seq embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    chunk: int,
    z_loss: float,
) -> Sums:
    """Return the weighted sum of -log softmax(hidden table^T)[target], in nats.

    Args:
      chunk: positions of each row at a time, at most.
      z_loss: factor of the squared log-sum-exp that is added to each loss.

    Returns:
      The sum; and for each position the loss without z-loss, and 1.0 where the target is the
      argmax. These have no gradient.
    """
    return _run(hidden, table, targets, weights, chunk, z_loss, False)[0]


def _forward(
    hidden: Any, table: Any, targets: Any, weights: Any, chunk: int, z_loss: float
) -> tuple[Sums, Any]:
    """Forward rule; with symbolic zeros an argument says whether it is differentiated.

    A frozen table is not, and gets no gradient.
    """
    sums, gradients = _run(
        hidden.value, table.value, targets.value, weights.value, chunk, z_loss, True,
        table.perturbed,
    )  # fmt: skip
    assert gradients is not None
    empty = (jnp.zeros((0,), hidden.value.dtype), jnp.zeros((0,), table.value.dtype))
    return sums, (*gradients, *empty)


def _backward(chunk: int, z_loss: float, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    of_hidden, of_table, hidden, table = residuals
    factor = cotangents[0]
    return (
        (of_hidden * factor).astype(hidden.dtype),
        None if of_table is None else (of_table * factor).astype(table.dtype),
        None,
        None,
    )


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(
    hidden: Array,
    table: Array,
    targets: Array,
    weights: Array,
    chunk: int,
    z_loss: float,
    with_gradients: bool,
    of_table_too: bool = False,
) -> tuple[Sums, tuple[Array, Array | None] | None]:
    batch, length, _ = hidden.shape
    count = -(-length // chunk)
    padding = -length % count  # positions without weight
    cast_table = whole_table(table, hidden.dtype)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, padding if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(padded.reshape(batch, count, -1, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        joined = jnp.moveaxis(x, 0, 1).reshape(batch, length + padding, *x.shape[3:])
        return joined[:, :length]

    def step(carry: Any, part: tuple[Array, ...]) -> tuple[Any, Any]:
        total, of_table = carry
        h, target, weight = part
        losses, hits, penalty, of_logits = _chunk(h, cast_table, target, weight, z_loss)
        total = total + jnp.sum(weight * (losses + penalty))
        if not with_gradients:
            return (total, of_table), (losses, hits)
        of_h = einsum("bsv,ve->bse", of_logits, cast_table, product_dtype(h))
        if of_table_too:
            # [embed, vocab]: transposes h and not the larger gradient of logits.
            of_table = of_table + einsum("bse,bsv->ev", h, of_logits)
        return (total, of_table), (losses, hits, of_h)

    start = jnp.zeros(table.shape[::-1] if of_table_too else (), jnp.float32)
    if of_table_too:
        start = constrain(start, (None, "vocab"))
    parts = tuple(map(split, (hidden, targets, weights)))
    if count == 1:
        (total, of_table), outputs = step((jnp.zeros(()), start), tuple(p[0] for p in parts))
        outputs = jax.tree.map(lambda x: x[None], outputs)
    else:
        (total, of_table), outputs = jax.lax.scan(step, (jnp.zeros(()), start), parts)
    losses, hits, *of_hidden = [join(x) for x in outputs]
    if not with_gradients:
        return (total, (losses, hits)), None
    if not of_table_too:
        return (total, (losses, hits)), (of_hidden[0], None)
    if is_for_cpu():
        # XLA would take the transpose into the product, which is then a fifth slower.
        of_table = jax.lax.optimization_barrier(of_table)
    # Scattered after the loop, not in each of its turns.
    of_table = constrain_parameters(constrain(of_table, (None, "vocab")).T, TABLE_AXES)
    return (total, (losses, hits)), (of_hidden[0], of_table)


def _chunk(
    hidden: Array, table: Array, targets: Array, weights: Array, z_loss: float
) -> tuple[Array, Array, Array, Array]:
    """Return losses, hits, z-losses, and the gradient of the weighted sum by the logits."""
    logits = constrain(einsum("bse,ve->bsv", hidden, table), ("batch", "seq", "vocab"))
    largest = jnp.max(logits, axis=-1)
    powers = jnp.exp(logits - largest[..., None])
    total = jnp.sum(powers, axis=-1)
    log_sum = largest + jnp.log(total)
    # A comparison, not a gather: the vocabulary is sharded.
    is_target = jnp.arange(table.shape[0], dtype=jnp.int32) == targets[..., None]
    chosen = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    factor = weights * (1 + 2 * z_loss * log_sum) / total
    of_logits = powers * factor[..., None] - jnp.where(is_target, weights[..., None], 0)
    hits = (chosen == largest).astype(jnp.float32)
    return log_sum - chosen, hits, z_loss * log_sum**2, of_logits.astype(hidden.dtype)
