"""Every backend of quantized_matmul equals the product in float64, step by step if need be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels.dispatch import BackendError
from glm_jax.kernels.quantized_matmul import cpu, pallas_gpu
from glm_jax.kernels.quantized_matmul.api import prepare, quantized_matmul
from glm_jax.kernels.quantized_matmul.arguments import Arguments
from glm_jax.kernels.quantized_matmul.cpu import CPUKernel, CPUTransposed
from glm_jax.kernels.quantized_matmul.pallas_gpu import Blocks, PallasGPU
from glm_jax.kernels.quantized_matmul.pallas_tpu import PallasTPU
from glm_jax.kernels.quantized_matmul.reference import Reference
from glm_jax.kernels.quantized_matmul.xla import XLA, XLATransposed
from glm_jax.quantization import QuantizedArray, Scheme, dequantize, quantize

INPUTS, OUTPUTS = 256, 128
# A backend, the dtype of its activations, and the layout of its weights.
BACKENDS = {
    "reference": (Reference(), "float32", None),
    "xla": (XLA(), "float32", None),
    "cpu": (CPUKernel(), "float32", cpu.tile),
    "pallas tpu": (PallasTPU(interpret=True), "bfloat16", None),
    "pallas gpu float16": (PallasGPU(interpret=True), "float16", None),
    "pallas gpu bfloat16": (PallasGPU(interpret=True), "bfloat16", None),
}
TRANSPOSED = {"xla": (XLATransposed(), None), "cpu": (CPUTransposed(), cpu.tile)}
# One group, four, and four with zero points.
SCHEMES = [Scheme(bits, *groups) for bits in (8, 4) for groups in ((None,), (64,), (64, True))]


@functools.cache
def _weight(scheme):
    weight = jax.random.normal(jax.random.key(0), (INPUTS, OUTPUTS))
    weight = quantize(weight, scheme, -2)
    return weight, np.asarray(dequantize(weight, "float32"), np.float64)


def _laid_out(scheme, layout):
    if layout is not None and not cpu.is_available():
        pytest.skip("the CPU kernel is not built: no C++ compiler at installation")
    weight, exact = _weight(scheme)
    return (weight if layout is None else layout(weight)), exact


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 33, 128])
def test_the_product(name, scheme, rows):
    backend, dtype, layout = BACKENDS[name]
    weight, exact = _laid_out(scheme, layout)
    x = jax.random.normal(jax.random.key(rows), (rows, INPUTS)).astype(dtype)
    bias = jnp.arange(OUTPUTS, dtype="float32") if rows > 1 else None
    arguments = Arguments(x, weight, bias)
    assert backend.supports(arguments) is None
    got = backend(arguments)
    assert got.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ exact
    np.testing.assert_allclose(got, expected if bias is None else expected + bias, atol=2e-3)


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_product_with_the_transpose(name, scheme):
    backend, layout = TRANSPOSED[name]
    weight, exact = _laid_out(scheme, layout)
    y = jax.random.normal(jax.random.key(1), (5, OUTPUTS))
    assert backend.supports(Arguments(y, weight)) is None
    got = backend(Arguments(y, weight))
    np.testing.assert_allclose(got, np.asarray(y, np.float64) @ exact.T, atol=1e-4)


def test_inputs_split_among_programs_and_tiles_of_many_inputs():
    scheme = Scheme(4, 64, True)
    x = jax.random.normal(jax.random.key(1), (5, 192)).astype("float16")
    weight = quantize(jax.random.normal(jax.random.key(0), (192, OUTPUTS)), scheme, -2)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(weight, "float32"), np.float64)
    blocks = Blocks(16, 64, 32, 3, 4, 3)
    got = pallas_gpu.matmul(x, weight, None, blocks, interpret=True)
    np.testing.assert_allclose(got, expected, atol=2e-3)
    long = jax.random.normal(jax.random.key(2), (5, 1536))
    weight = quantize(jax.random.normal(jax.random.key(0), (1536, OUTPUTS)), scheme, -2)
    exact = np.asarray(dequantize(weight, "float32"), np.float64)
    np.testing.assert_allclose(XLA()(Arguments(long, weight)), long @ exact, atol=1e-3)


@pytest.mark.parametrize(
    ("backend", "dtype", "shape", "reason"),
    [
        (PallasGPU(interpret=True), "float32", (256, 128), "it takes activations in 16 bits"),
        (PallasGPU(), "float16", (256, 128), "it takes compute capability 8.0 and later"),
        (PallasGPU(interpret=True), "float16", (256, 40), "it takes sizes that its blocks divide"),
        (PallasTPU(), "bfloat16", (256, 40), "it takes outputs in multiples of 128"),
        (CPUKernel(), "float32", (256, 128), "it takes a weight in its own layout"),
    ],
)
def test_reasons(backend, dtype, shape, reason):
    weight = quantize(jnp.ones(shape), Scheme(4, search=False), -2)
    assert backend.supports(Arguments(jnp.ones((1, shape[0]), dtype), weight)) == reason


def test_by_name():
    weight, exact = _weight(SCHEMES[0])
    x = jax.random.normal(jax.random.key(0), (2, INPUTS))
    for name in ("reference", "xla"):
        got = quantized_matmul(x, weight, implementation=name)
        np.testing.assert_allclose(got, np.asarray(x, np.float64) @ exact, atol=1e-3)
        gradient = jax.grad(lambda x, n=name: quantized_matmul(x, weight, None, n).sum())(x)
        np.testing.assert_allclose(gradient, np.broadcast_to(exact.sum(1), x.shape), atol=1e-3)
    with pytest.raises(BackendError, match="'pallas' cannot be used here: it runs on cuda"):
        quantized_matmul(x, weight, implementation="pallas")
    with pytest.raises(BackendError, match="'cpu' cannot be used here: it takes a weight in its"):
        quantized_matmul(x, weight, implementation="cpu")


def test_kernels_of_integers_leave_other_numbers_to_xla():
    """A format of 8 bits that is no integer, as another one would be."""

    class OfFloats(QuantizedArray):
        stored_dtype = "float8_e4m3fn"

    integers, _ = _weight(SCHEMES[0])
    fields = {name: getattr(integers, name) for name in ("values", "scales", "bits")}
    weight = OfFloats(**fields, contraction_axis=-2)
    arguments = Arguments(jnp.ones((1, INPUTS), "bfloat16"), weight)
    for name, (backend, _, layout) in BACKENDS.items():
        if layout is None:
            assert (backend.supports(arguments) is None) == (name in ("reference", "xla"))
    assert prepare(weight) is weight
    with pytest.raises(BackendError, match="does not take the weight: it is float8_e4m3fn"):
        prepare(weight, layout="mosaic")
