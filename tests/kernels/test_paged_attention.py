"""Attention over pages equals the formula, by every backend that runs here and for any number of
new queries a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from kernels.backends import pairs
from kernels.formula import assert_close, attended_over_pages

from glm_jax.kernels.dispatch import BackendError
from glm_jax.kernels.paged_attention import cpu
from glm_jax.kernels.paged_attention.api import paged_attention
from glm_jax.kernels.paged_attention.arguments import Arguments
from glm_jax.kernels.paged_attention.cpu import CPUPages
from glm_jax.kernels.paged_attention.library_gpu import LibraryGPU
from glm_jax.kernels.paged_attention.library_tpu import LibraryTPU
from glm_jax.kernels.paged_attention.reference import Reference
from glm_jax.kernels.paged_attention.xla import XLA
from glm_jax.model.paged_cache import quantize_heads
from glm_jax.sharding import make_mesh

BACKENDS = {
    "xla": XLA(),
    **{f"cpu {bits}": CPUPages(bits) for bits in (512, 256, 0)},
    "library on GPUs": LibraryGPU(),
    "library on TPUs": LibraryTPU(),
}


@functools.cache
def _inputs(batch, heads, pages, page_size, head_dim, table_size, new=1, dtype="float32"):
    draws = jax.random.split(jax.random.key(0), 3)
    query = 3 * jax.random.normal(draws[0], (batch, new, heads, head_dim))
    shape = (heads, pages, page_size, head_dim)
    keys, values = (jax.random.normal(k, shape) for k in draws[1:])
    scales = (None, None)
    if dtype == "int8":
        keys, values, *scales = quantize_heads(keys, values)
    else:
        keys, values = keys.astype(dtype), values.astype(dtype)
    rng = np.random.default_rng(0)
    tables = jnp.asarray(rng.integers(0, pages, (batch, table_size)), jnp.int32)
    # Each sees one key more than the one before it; rows have from one to all `new` of them.
    lengths = rng.integers(new, table_size * page_size + 1, (batch, 1)) - new + 1 + np.arange(new)
    lengths[0] = table_size * page_size - new + 1 + np.arange(new)
    lengths = np.where(np.arange(new) < new - np.arange(batch)[:, None] % new, lengths, 0)
    return Arguments(query, keys, values, tables, jnp.asarray(lengths, jnp.int32), *scales)


CASES = {
    f"{dtype} {shape}": functools.partial(_inputs, *shape, dtype)
    for dtype in ("float32", "bfloat16", "int8")
    for shape in [(3, 2, 5, 16, 16, 1, 3), (4, 3, 40, 16, 48, 21, 1), (4, 4, 9, 64, 128, 5, 4)]
}
FEW = {"few": functools.partial(_inputs, 3, 2, 8, 16, 16, 2)}


@pairs(BACKENDS | {"reference": Reference()}, CASES)
def test_equals_the_formula(backend, case):
    arguments = case()
    assert_close(backend(arguments), attended_over_pages(arguments), 3e-6)


@pairs(BACKENDS, FEW)
@pytest.mark.parametrize("beyond", [1e30, np.nan])
def test_only_the_pages_of_a_row_are_read_and_one_without_keys_is_zero(backend, case, beyond):
    arguments = case()
    tables = jnp.array([[1, 2], [3, 0], [0, 0]], jnp.int32)
    lengths = jnp.array([[20], [16], [0]], jnp.int32)
    unseen = jnp.arange(8)[:, None] * 16 + jnp.arange(16)
    unseen = (unseen < 16) | (unseen >= 36) & (unseen < 48) | (unseen >= 64)
    arguments = arguments.replace(tables=tables, lengths=lengths)
    hide = lambda x: jnp.where(unseen[:, :, None], beyond, x)
    hidden = arguments.replace(keys=hide(arguments.keys), values=hide(arguments.values))
    got = backend(hidden)
    np.testing.assert_array_equal(got, backend(arguments))
    assert (got[2] == 0).all()
    assert (got[:2] != 0).all()


def test_on_a_mesh_each_device_reads_its_own_pages():
    """Rows over data, heads over tensor; tables count the pages of a device."""
    a = _inputs(4, 4, 12, 16, 16, 3, 2)
    tables = a.tables % 6
    mesh = make_mesh((2, 1, 4))
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    with jax.set_mesh(mesh):
        got = jax.jit(paged_attention)(
            put(a.query, "data", None, "tensor"),
            put(a.keys, "tensor", "data"),
            put(a.values, "tensor", "data"),
            put(tables, "data"),
            put(a.lengths, "data"),
        )
    whole = tables + jnp.array([0, 0, 6, 6])[:, None]
    np.testing.assert_allclose(got, Reference()(a.replace(tables=whole)), atol=5e-6)


def test_by_name():
    a = _inputs(3, 2, 5, 16, 16, 1)
    operands = (a.query, a.keys, a.values, a.tables, a.lengths)
    for name in ("xla", "reference", *(["cpu"] if cpu.is_available() else [])):
        got = paged_attention(*operands, implementation=name)
        np.testing.assert_allclose(got, paged_attention(*operands), atol=5e-6)
    with pytest.raises(BackendError, match="it runs on cuda, and this is cpu; it runs on tpu, and"):
        paged_attention(*operands, implementation="library")
