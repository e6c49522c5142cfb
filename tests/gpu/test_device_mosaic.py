"""The Mosaic kernel equals float64, on a GPU of compute capability 9.0 at the 130B's shapes.

Elsewhere a laid-out weight is converted tile by tile and multiplied by XLA; sizes are small there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config import GLMConfig
from glm_jax.kernels import self_check, target
from glm_jax.kernels.quantized_matmul import mosaic_check
from glm_jax.kernels.quantized_matmul.api import prepare, quantized_matmul
from glm_jax.kernels.quantized_matmul.arguments import Arguments
from glm_jax.kernels.quantized_matmul.mosaic import MosaicConverted, MosaicTiles
from glm_jax.kernels.quantized_matmul.mosaic_check import Kind
from glm_jax.model import device_layout
from glm_jax.model import params as glm_params
from glm_jax.model.glm import forward
from glm_jax.quantization import QuantizedArray, Scheme, dequantize
from glm_jax.sharding import make_mesh, on_mesh

pytestmark = pytest.mark.gpu
IS_GPU = jax.default_backend() == "gpu"
HAS_KERNEL = target.requires_mosaic_gpu()[0] and any(map(mosaic_check.is_for, jax.devices()))
DRAWN = np.random.default_rng(0).integers(48, 2050, 6).tolist()
ROWS = (*range(1, 34), *DRAWN, 64, 65, 129, 2049) if IS_GPU else (1, 33)
FEW_ROWS = (1, 8, 33, 64, 130, 2049) if IS_GPU else (1,)
# Inputs, outputs, groups: an odd number of groups, which all rows are tried with; a whole
# linear's, parts of others.
SHAPES = (
    ((4992, 1536, 39), (12288, 4608, 1), (1536, 12288, 12), (960, 256, 15), (96 * 64, 192, 192))
    if IS_GPU
    else ((192, 64, 3),)
)
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}


def _weight(shape, bits, dtype, zeros):
    """As it is stored, and in float64."""
    inputs, outputs, groups = shape
    draws = jax.random.split(jax.random.key(bits), 3)
    scales = jax.random.uniform(draws[1], (groups, outputs), minval=0.005, maxval=0.015)
    points = jax.random.randint(draws[2], (groups, outputs), -3, 4, jnp.int8)
    size = inputs * bits // 8, outputs
    weight = QuantizedArray(
        values=jax.random.bits(draws[0], size, jnp.uint8).astype(jnp.int8),
        scales=scales.astype(dtype),
        bits=bits,
        contraction_axis=-2,
        zero_points=points if zeros else None,
        axes=("embed", "mlp"),
    )
    return weight, np.asarray(dequantize(weight, jnp.float32), np.float64)


def _activations(rows, columns, dtype):
    """Whose mean is not 0: the hard case for what is taken off by their sums."""
    x = jax.random.normal(jax.random.key(7), (rows, columns)) + 0.5
    return (0.1 * x).astype(dtype)


def _assert_near(product, exact, dtype):
    error = np.linalg.norm(np.asarray(product, np.float64) - exact)
    assert error < TOLERANCE[dtype] * np.linalg.norm(exact), len(exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("zeros", [False, True])
def test_products_of_all_rows(shape, bits, dtype, zeros):
    weight, exact_weight = _weight(shape, bits, dtype, zeros)
    laid_out = prepare(weight, layout="mosaic")
    counts = ROWS if shape == SHAPES[0] else FEW_ROWS
    x = _activations(max(counts), shape[0], dtype)
    exact = np.asarray(x, np.float64) @ exact_weight
    products = jax.jit(lambda x, w: [quantized_matmul(x[:rows], w) for rows in counts])
    products = products.lower(x, laid_out).compile()
    if HAS_KERNEL:  # which is what is used, for every number of rows
        text = products.as_text()
        assert text.count('custom_call_target="mosaic_gpu') == len(counts)
        assert " dot(" not in text
        assert "__cublas" not in text
    for product in products(x, laid_out):
        _assert_near(product, exact[: len(product)], dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [48, 2048] if IS_GPU else [48])
def test_gradients_and_converted_tiles(bits, rows):
    shape = SHAPES[min(1, len(SHAPES) - 1)]
    weight, exact_weight = _weight(shape, bits, "float16", True)
    laid_out = prepare(weight, layout="mosaic")
    x = _activations(rows, shape[0], "float16")
    exact = np.asarray(x, np.float64) @ exact_weight
    for backend in (MosaicConverted(), MosaicTiles()):
        if backend.supports(Arguments(x, laid_out)) is None:
            converted = jax.jit(lambda x, w, b=backend: b(Arguments(x, w)))(x, laid_out)
            _assert_near(converted, exact, "float16")
    y = _activations(rows, shape[1], "float16")
    gradient = jax.jit(lambda x, y, w: jax.vjp(lambda x: quantized_matmul(x, w), x)[1](y))
    [back] = gradient(x, y.astype(jnp.float32), laid_out)
    _assert_near(back, np.asarray(y, np.float64) @ exact_weight.T, "float16")


@pytest.mark.skipif(not HAS_KERNEL, reason="no GPU of compute capability 8.0 to 9.0")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_check_of_the_kernel_passes(bits, dtype, monkeypatch):
    """In its own process, as `prepare` runs it: whole rows, and groups with zero points."""
    monkeypatch.setattr(self_check, "_note_of_pass", lambda *_: None)  # though it passed before
    kinds = [Kind(bits, 4096, 4096, dtype, False), Kind(bits, 4096, 128, dtype, True)]
    argument = mosaic_check.described(kinds)
    # In less time than the test has.
    assert self_check.check_apart(mosaic_check.__name__, argument, seconds=100) is None


def test_a_model_is_laid_out_on_a_mesh_of_one(monkeypatch):
    """And gives the logits of the weights as they are stored."""
    in_time = functools.partial(self_check.check_apart, seconds=100)  # before the test is ended
    monkeypatch.setattr(self_check, "check_apart", in_time)
    config = GLMConfig(2, 256, 768, 4, 512, 64, param_dtype="float16", compute_dtype="float16")
    tokens, mask = jnp.arange(8)[None], jnp.ones((1, 8, 8), bool)
    logits = {}
    mesh = make_mesh((1, 1, 1))
    for value in ("stored", ""):
        monkeypatch.setenv("GLM_JAX_QUANTIZED_LAYOUT", value)
        params = glm_params.init(config, jax.random.key(0), mesh)
        params = glm_params.quantize_params(params, Scheme(4, 64))
        with on_mesh(mesh):
            prepared = device_layout.prepare(params, donate=True)
            logits[value] = np.asarray(forward(prepared, config, tokens, tokens, mask))
        is_laid_out = prepared.layers[0].dense.weight.array.layout == "mosaic"
        assert is_laid_out == (value == "" and HAS_KERNEL)
    np.testing.assert_allclose(logits[""], logits["stored"], atol=3e-2)
