"""Attention over pages equals the formula, by every backend that runs here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax.kernels.attention import cpu
from glm_jax.kernels.paged_attention import reference, xla
from glm_jax.kernels.paged_attention.api import paged_attention
from glm_jax.model.cache import quantize_heads
from glm_jax.sharding import make_mesh


def _cpu(widest):
    return functools.partial(cpu.paged_attention, widest=widest)


BACKENDS = {"xla": xla.paged_attention, "api": paged_attention} | (
    {f"cpu {bits}": _cpu(bits) for bits in (512, 256, 0)} if cpu.is_available() else {}
)


def _inputs(batch, heads, pages, page_size, head_dim, table_size, dtype="float32"):
    draws = jax.random.split(jax.random.key(0), 3)
    query = 3 * jax.random.normal(draws[0], (batch, heads, head_dim))
    shape = (heads, pages, page_size, head_dim)
    keys, values = (jax.random.normal(k, shape) for k in draws[1:])
    scales = (None, None)
    if dtype == "int8":
        keys, values, *scales = quantize_heads(keys, values)
    else:
        keys, values = keys.astype(dtype), values.astype(dtype)
    rng = np.random.default_rng(0)
    tables = jnp.asarray(rng.integers(0, pages, (batch, table_size)), jnp.int32)
    lengths = rng.integers(1, table_size * page_size + 1, batch)
    lengths[0] = table_size * page_size
    return query, keys, values, tables, jnp.asarray(lengths, jnp.int32), *scales


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "shape", [(3, 2, 5, 16, 16, 1), (4, 3, 40, 16, 48, 21), (2, 4, 9, 64, 128, 5)]
)
def test_equals_the_formula(backend, dtype, shape):
    inputs = _inputs(*shape, dtype)
    got = BACKENDS[backend](*inputs)
    np.testing.assert_allclose(got, reference.paged_attention(*inputs), atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beyond", [1e30, np.nan])
def test_only_the_pages_of_a_row_are_read_and_one_without_keys_is_zero(backend, beyond):
    query, keys, values, tables, lengths, *_ = _inputs(3, 2, 8, 16, 16, 2)
    tables = jnp.array([[1, 2], [3, 0], [0, 0]], jnp.int32)
    lengths = jnp.array([20, 16, 0], jnp.int32)
    unseen = jnp.arange(8)[:, None] * 16 + jnp.arange(16)
    unseen = (unseen < 16) | (unseen >= 36) & (unseen < 48) | (unseen >= 64)
    hidden = [jnp.where(unseen[:, :, None], beyond, x) for x in (keys, values)]
    got = BACKENDS[backend](query, *hidden, tables, lengths)
    np.testing.assert_array_equal(got, BACKENDS[backend](query, keys, values, tables, lengths))
    assert (got[2] == 0).all()
    assert (got[:2] != 0).all()


def test_on_a_mesh_each_device_reads_its_own_pages():
    """Rows over data, heads over tensor; tables count the pages of a device."""
    query, keys, values, tables, lengths, *_ = _inputs(4, 4, 12, 16, 16, 3)
    tables = tables % 6
    mesh = make_mesh((2, 1, 4))
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    with jax.set_mesh(mesh):
        got = jax.jit(paged_attention)(
            put(query, "data", "tensor"),
            put(keys, "tensor", "data"),
            put(values, "tensor", "data"),
            put(tables, "data"),
            put(lengths, "data"),
        )
    whole = tables + jnp.array([0, 0, 6, 6])[:, None]
    expected = reference.paged_attention(query, keys, values, whole, lengths)
    np.testing.assert_allclose(got, expected, atol=5e-6)
