"""Weights in the layout for compute capability 9.0, divided over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels.dispatch import BackendError
from glm_jax.kernels.quantized_matmul import mosaic_prepare
from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks
from glm_jax.model.params import KERNEL_AXES
from glm_jax.quantization import Scheme, dequantize, quantize
from glm_jax.sharding import make_mesh, on_mesh, parameter_sharding

SHAPES = {
    "query_key_value": (128, 4, 3, 32),
    "dense": (128, 256),
    "dense_h_to_4h": (256, 2, 128),
    "dense_4h_to_h": (384, 128),
}
SCHEMES = {"groups": Scheme(4, 64, True), "odd groups": Scheme(8, 128), "rows": Scheme(4, None)}


def _weight(name, shape, scheme, mesh):
    """As it is stored, on a mesh; and in float64."""
    axes = KERNEL_AXES[name]

    @jax.jit
    def make():
        floats = jax.random.normal(jax.random.key(0), shape)
        weight = quantize(floats, scheme, -len(shape), axes)
        weight = weight.replace(scales=weight.scales.astype("float16"))
        return weight, dequantize(weight, "float32")

    weight, exact = make()
    exact = np.asarray(exact, np.float64)

    def put(a):
        is_divided = a is weight.values or weight.groups % 2 == 0
        own = axes if is_divided else (None, *axes[1:])
        return jax.device_put(a, parameter_sharding(mesh, own, a.shape))

    return jax.tree.map(put, weight), exact


@pytest.mark.parametrize(
    ("name", "scheme", "shape_of_mesh"),
    [
        ("query_key_value", "groups", (2, 2, 2)),
        ("dense", "groups", (2, 2, 2)),
        ("dense_h_to_4h", "rows", (1, 2, 2)),
        ("dense_4h_to_h", "odd groups", (1, 1, 2)),
    ],
)
def test_products_and_gradients_of_a_divided_weight(name, scheme, shape_of_mesh):
    mesh, shape = make_mesh(shape_of_mesh), SHAPES[name]
    stored, exact = _weight(name, shape, SCHEMES[scheme], mesh)
    laid_out = mosaic_prepare.prepare(stored, mesh)
    assert laid_out.shape == shape
    # Each device lays out what it has: nothing is sent, and nothing is there twice.
    size = lambda a: a.addressable_shards[0].data.nbytes
    assert size(laid_out.values) == size(stored.values)
    describe = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    described = mosaic_prepare.describe(jax.tree.map(describe, stored), mesh)
    for a, b in zip(jax.tree.leaves(laid_out), jax.tree.leaves(described), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 3, shape[0])), "float16")
    with on_mesh(mesh):
        product, [back] = jax.jit(_both)(x, laid_out)
    wanted = np.tensordot(np.asarray(x, np.float64), exact, 1)
    np.testing.assert_allclose(product, wanted, atol=1e-3 * np.abs(wanted).max())
    wanted = np.broadcast_to(exact.reshape(len(exact), -1).sum(1), x.shape)
    np.testing.assert_allclose(back, wanted, atol=2e-3 * np.abs(wanted).max())


def _both(x, weight):
    """The product, and the gradient of its sum to x."""
    product, gradient = jax.vjp(lambda x: quantized_matmul(x, weight), x)
    return product, gradient(jnp.ones_like(product))


@pytest.mark.parametrize("name", ["dense_h_to_4h", "dense_4h_to_h"])
def test_the_kernel_multiplies_the_parts_of_devices(name):
    """In the interpreter, which runs one device at a time."""
    kernel = pytest.importorskip("glm_jax.kernels.quantized_matmul.mosaic_gpu")
    if jax.__version_info__ < (0, 11):
        pytest.skip("JAX before 0.11 has no interpreter of the kernel")
    mesh, shape = make_mesh((1, 1, 2)), SHAPES[name]
    stored, exact = _weight(name, shape, SCHEMES["groups"], mesh)
    laid_out = mosaic_prepare.prepare(stored, mesh)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, shape[0])), "float16")
    blocks = Blocks(8, 1, 1, 64, 2, 3, raw=True)
    wanted = np.tensordot(np.asarray(x, np.float64), exact, 1)
    total = np.zeros(wanted.shape)
    for number in range(2):
        arrays = jax.tree.map(lambda a, n=number: a.addressable_shards[n], laid_out)
        part = jax.tree.map(lambda s: jax.device_put(np.asarray(s.data)), arrays)
        inputs, *outputs = arrays.scales.index  # groups of inputs
        per_group = shape[0] // laid_out.groups
        first, end, _ = inputs.indices(laid_out.groups)
        columns = x[:, first * per_group : end * per_group]
        product = kernel.matmul(columns, part.flattened(), blocks, interpret=True)
        total[(slice(None), *outputs)] += np.asarray(product).reshape(3, *part.shape[1:])
    np.testing.assert_allclose(total, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("dense_h_to_4h", (64, 2, 192), "outputs, .2, 96., are no multiple of 64"),
        ("dense_4h_to_h", (192, 128), "96 inputs and 128 outputs are no multiples"),
        ("query_key_value", (128, 3, 1, 16), "outputs, .3, 1, 16., are no multiple of 64"),
    ],
)
def test_parts_without_whole_tiles_are_refused(name, shape, reason):
    mesh = make_mesh((1, 1, 2)) if name != "query_key_value" else make_mesh((1, 2, 1))
    stored, _ = _weight(name, shape, Scheme(8, None), mesh)
    with pytest.raises(BackendError, match=reason):
        mosaic_prepare.prepare(stored, mesh)
