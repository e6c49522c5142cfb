"""The C++ kernel equals the reference, whatever vectors the machine has."""

import itertools
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden

from glm_jax.generation.generate import generate
from glm_jax.kernels import cpu_library
from glm_jax.kernels.quantized_matmul import cpu, reference
from glm_jax.kernels.quantized_matmul.api import prepare as prepare_weight
from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.kernels.quantized_matmul.cpu import TiledArray
from glm_jax.model import params as glm_params
from glm_jax.model.device_layout import prepare
from glm_jax.quantization import QuantizedArray, Scheme, dequantize, pack_int4, quantize

pytestmark = pytest.mark.skipif(
    not cpu.is_available(), reason="the CPU kernel is not built: no C++ compiler at installation"
)


WIDTHS = (512, 256, 0)  # bits of vectors; what the machine lacks falls back to the next
SHAPES = pytest.mark.parametrize(
    ("inputs", "outputs", "groups"),
    [(96, (5,), 3), (128, (3, 3, 8), 4), (4160, (20,), 1), (5120, (17,), 40)],
)
ROWS = (1, 2, 3, 4, 5, 13)


def _weight(bits, inputs, outputs, groups, zero_point=False):
    axis = -1 - len(outputs)
    scheme = Scheme(bits, None, zero_point, search=False)
    floats = 1 + jax.random.normal(jax.random.key(0), (inputs, *outputs))
    parts = [quantize(part, scheme, axis) for part in jnp.split(floats, groups)]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    assert joined.groups == groups
    return joined


def _relative_error(got, expected):
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


@SHAPES
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_equals_the_reference(bits, zero_point, inputs, outputs, groups):
    weight = _weight(bits, inputs, outputs, groups, zero_point)
    tiled = cpu.tile(weight)
    assert tiled.shape == weight.shape
    x = jax.random.normal(jax.random.key(1), (ROWS[-1], inputs))
    expected = reference.matmul(x, weight)
    for rows, vector_bits in itertools.product(ROWS, WIDTHS):
        assert _relative_error(cpu.matmul(x[:rows], tiled, vector_bits), expected[:rows]) < 3e-6


@SHAPES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_weights_equal_the_plain_product(dtype, inputs, outputs, groups):
    weight = jax.random.normal(jax.random.key(0), (inputs, *outputs)).astype(dtype)
    tiled = cpu.tile(weight)
    x = jax.random.normal(jax.random.key(1), (ROWS[-1], inputs))
    expected = jnp.tensordot(x, weight.astype(jnp.float32), 1, precision="highest")
    for rows, vector_bits in itertools.product(ROWS, WIDTHS):
        assert _relative_error(cpu.matmul(x[:rows], tiled, vector_bits), expected[:rows]) < 3e-6


@SHAPES
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_activations_in_8_bits_equal_rounded_ones(bits, zero_point, inputs, outputs, groups):
    """The kernel's integers give what floats give that were rounded in the same way."""
    weight = _weight(bits, inputs, outputs, groups, zero_point)
    tiled = cpu.tile(weight, activation_bits=8)
    block = math.gcd(inputs // groups, 64)
    x = jax.random.normal(jax.random.key(1), (ROWS[-1], inputs))
    parts = x.reshape(len(x), -1, block)
    scales = jnp.max(jnp.abs(parts), axis=-1, keepdims=True) / 127
    rounded = (jnp.round(parts / scales) * scales).reshape(x.shape)
    of_rounded, exact = reference.matmul(rounded, weight), reference.matmul(x, weight)
    for rows, vector_bits in itertools.product(ROWS, WIDTHS):
        got = cpu.matmul(x[:rows], tiled, vector_bits)
        # A quotient near a half may go either way.
        assert _relative_error(got, of_rounded[:rows]) < 1e-3
        assert 1e-4 < _relative_error(got, exact[:rows]) < 1.5e-2


def test_what_is_not_finite_stays_so_with_activations_in_8_bits():
    tiled = cpu.tile(_weight(4, 128, (16,), 2), activation_bits=8)
    for bad, vector_bits in itertools.product((jnp.inf, -jnp.inf, jnp.nan), WIDTHS):
        x = jnp.ones((2, 128)).at[1, 70].set(bad)
        got = cpu.matmul(x, tiled, vector_bits)
        assert np.isfinite(got[0]).all()
        assert not np.isfinite(got[1]).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_every_value_of_every_place_survives(bits):
    """A one in each input in turn picks out that row of the weight."""
    largest = 2 ** (bits - 1)
    values = np.random.default_rng(0).integers(-largest, largest, (32, 20)).astype(np.int8)
    scales = jnp.ones((1, 20))
    packed = jnp.asarray(values)
    if bits == 4:
        packed = pack_int4(packed, 0)
    tiled = cpu.tile(QuantizedArray(packed, scales, bits, -2))
    np.testing.assert_array_equal(cpu.matmul(jnp.eye(32), tiled), values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_under_jit_with_leading_axes(dtype):
    weight = quantize(jax.random.normal(jax.random.key(0), (64, 2, 40)), Scheme(4), -3)
    x = jax.random.normal(jax.random.key(1), (2, 3, 64)).astype(dtype)
    got = jax.jit(quantized_matmul)(x, prepare_weight(weight))
    assert got.shape == (2, 3, 2, 40)
    expected = reference.matmul(x.astype(jnp.float32), weight)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_without_a_compiler_there_is_one_warning_and_the_plain_path(monkeypatch):
    monkeypatch.setattr(cpu, "LIBRARY", "never_built")
    with pytest.warns(UserWarning, match="never_built .not built"):
        assert not cpu.is_available()


def test_libraries_for_other_versions_of_jaxlib_are_passed_over(tmp_path):
    library = tmp_path / "kernel"
    (tmp_path / "kernel_ffi99_10.so").write_bytes(b"of a jaxlib to come")
    with pytest.warns(UserWarning, match="no CPU kernel kernel .kernel_ffi99_10.so is for another"):
        assert not cpu_library.register(library, "glm_jax_quantized_matmul")
    [built, *_] = sorted(Path(cpu.__file__).parent.glob("libglm_jax_cpu_ffi*.so"))
    shutil.copy(built, tmp_path / "kernel_ffi0_3.so")
    # The same handler by another name, which this process has not registered yet.
    assert cpu_library.register(library, "glm_jax_quantized__matmul")


def test_shapes_that_do_not_fit_stay_as_they_are():
    weight = quantize(jnp.ones((12, 4)), Scheme(4), -2)
    assert prepare_weight(weight) is weight


@pytest.mark.parametrize("bits", [8, 4])
def test_decoding_uses_it_and_writes_what_the_dequantised_weights_write(tiny_model, bits):
    config, params = tiny_model
    _assert_decodes_as_dequantised(
        config, glm_params.quantize_params(params, Scheme(bits)), TiledArray
    )


@pytest.mark.parametrize("folder", ["int8_tp2", "int4_tp1"])
def test_shards_of_the_original_decode_as_their_dequantised_weights(golden_special, folder):
    """Scales per shard are groups along the inputs."""
    config, params = load_golden(folder, "float32")
    config = config.replace(special_tokens=golden_special)
    _assert_decodes_as_dequantised(config, params, TiledArray)


def _assert_decodes_as_dequantised(config, params, kind):
    def is_quantized(leaf):
        return isinstance(leaf, QuantizedArray)

    def dequantized(leaf):
        return dequantize(leaf, jnp.float32) if is_quantized(leaf) else leaf

    prepared = prepare(params)
    assert isinstance(prepared.layers[0].dense_4h_to_h.kernel, kind)
    special = config.special_tokens
    prompts = [[5, 6, 7, special.gmask], [9, special.mask, 11]]
    exact = jax.tree.map(dequantized, params, is_leaf=is_quantized)
    expected = generate(exact, config, prompts, max_length=24)
    assert generate(prepared, config, prompts, max_length=24) == expected
