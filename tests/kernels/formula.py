"""Attention and its gradient in float64, as the formula says them."""

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.kernels.attention.arguments import Arguments
from glm_jax.kernels.attention.dropout import factors


def _operands(arguments):
    """Query, key and value in float64, what each query sees, and what dropout multiplies by."""
    a = arguments
    query, key, value = (np.asarray(x, np.float64) for x in (a.query, a.key, a.value))
    batch, queries, heads, _ = query.shape
    keys = key.shape[2]
    seen = np.asarray(a.visible)
    if a.has_ranges:
        bounds = seen.reshape(batch, queries, -1, 2, 1)
        seen = ((np.arange(keys) >= bounds[..., 0, :]) & (np.arange(keys) < bounds[..., 1, :])).any(
            2
        )
    drop = 1.0
    if a.dropout is not None:
        drop = factors(a.dropout, batch, heads, jnp.arange(queries), jnp.arange(keys))
    return query, key, value, seen, np.asarray(drop, np.float64)


def _weights(query, key, seen):
    scores = np.einsum("bqhd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    scores = np.where(seen[:, None], scores, -1e30)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * seen[:, None]
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)


def attended(arguments):
    """[batch, query, heads, head_dim] in float64; zeros for queries that see nothing."""
    query, key, value, seen, drop = _operands(arguments)
    return np.einsum("bhqk,bhkd->bqhd", _weights(query, key, seen) * drop, value)


def attended_over_pages(arguments):
    """[batch, new, heads, head_dim] in float64, of arguments of `paged_attention`."""
    a = arguments

    def in_order(pages, scales):
        """[batch, heads, keys, head_dim]."""
        wide = pages if scales is None else pages * scales[..., None]
        rows = jnp.moveaxis(wide[:, a.tables], 0, 1)
        return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])

    key, value = in_order(a.keys, a.key_scales), in_order(a.values, a.value_scales)
    seen = jnp.arange(key.shape[2]) < a.lengths[..., None]
    return attended(Arguments(a.query, key, value, seen))


def gradients(arguments, cotangent):
    """Of query, key and value, in float64."""
    query, key, value, seen, drop = _operands(arguments)
    cotangent = np.asarray(cotangent, np.float64)
    weights = _weights(query, key, seen)
    of_weights = np.einsum("bqhd,bhkd->bhqk", cotangent, value) * drop
    centre = (of_weights * weights).sum(axis=-1, keepdims=True)
    of_scores = weights * (of_weights - centre) / query.shape[-1] ** 0.5
    return (
        np.einsum("bhqk,bhkd->bqhd", of_scores, key),
        np.einsum("bhqk,bqhd->bhkd", of_scores, query),
        np.einsum("bhqk,bqhd->bhkd", weights * drop, cotangent),
    )


def assert_close(got, expected, tolerance):
    """Args:
    tolerance: of the largest number in the expected array.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def normal(seed, *shapes, dtype="float32"):
    """Arrays of the standard normal distribution."""
    draws = jax.random.split(jax.random.key(seed), len(shapes))
    return [
        jax.random.normal(d, shape).astype(dtype) for d, shape in zip(draws, shapes, strict=True)
    ]
