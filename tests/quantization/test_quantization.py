"""Quantised weights: the original's integers, and what dequantising loses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden

from glm_jax import make_mesh, restore, save_model
from glm_jax.checkpoints.model_folder import CheckpointError, stored_format
from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.model import params as glm_params
from glm_jax.quantization import (
    QuantizationError,
    Scheme,
    WeightFormat,
    dequantize,
    pack_int4,
    quantize,
    unpack_int4,
)
from glm_jax.quantization.formats import format_of


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_and_scales_equal_the_originals(bits):
    _, params = load_golden("tp1", "float16")
    _, expected = load_golden(f"int{bits}_tp1", "float16")
    got = glm_params.quantize_params(params, Scheme(bits, search=False))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_packing_round_trip(axis):
    values = np.random.default_rng(0).integers(-8, 8, (4, 6, 10)).astype(np.int8)
    packed = pack_int4(jnp.asarray(values), axis)
    assert packed.size == values.size // 2
    np.testing.assert_array_equal(unpack_int4(packed, axis), values)


def test_packing_puts_the_even_index_high():
    packed = pack_int4(jnp.array([1, -2], jnp.int8), 0)
    assert int(packed[0]) & 0xFF == 0x1E


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("zero_point", [False, True])
def test_error_is_at_most_half_a_step(bits, groups, zero_point):
    weight = jax.random.normal(jax.random.key(0), (128, 3, 5))
    size = None if groups == 1 else 128 // groups
    array = quantize(weight, Scheme(bits, size, zero_point, search=False), -3)
    assert array.shape == weight.shape
    assert array.groups == groups
    error = np.abs(dequantize(array, jnp.float32) - weight).reshape(groups, -1, 3, 5)
    assert (error <= 0.501 * np.asarray(array.scales)[:, None]).all()


def test_rows_of_zeros_stay_zero():
    array = quantize(jnp.zeros((4, 2)), Scheme(4), -2)
    np.testing.assert_array_equal(dequantize(array, jnp.float32), np.zeros((4, 2)))


@pytest.mark.parametrize("bits", [8, 4])
def test_product_equals_that_with_the_dequantised_weight(bits):
    x = jax.random.normal(jax.random.key(1), (2, 3, 64))
    weight = quantize(jax.random.normal(jax.random.key(0), (64, 2, 4)), Scheme(bits, 32), -3)
    expected = np.einsum("bsk,kcn->bscn", x, dequantize(weight, jnp.float32))
    np.testing.assert_allclose(quantized_matmul(x, weight), expected, atol=1e-5)
    gradient = jax.grad(lambda x: quantized_matmul(x, weight).sum())(x)
    expected = np.broadcast_to(dequantize(weight, jnp.float32).sum((1, 2)), x.shape)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zero_point", [False, True])
def test_the_search_never_loses_and_wins_at_four_bits(bits, zero_point):
    weight = jax.random.normal(jax.random.key(0), (512, 64))
    arrays = [
        quantize(weight, Scheme(bits, 128, zero_point, search), -2) for search in (False, True)
    ]
    plain, searched = (jnp.linalg.norm(dequantize(a, "float32") - weight) for a in arrays)
    assert searched <= plain
    if bits == 4:
        assert searched < 0.95 * plain
    assert 8 * arrays[0].nbytes / arrays[0].size == bits + (32 + 8 * zero_point) / 128


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("int8", Scheme(8)),
        ("int4,group=64", Scheme(4, 64)),
        ("int4-g128-zp", Scheme(4, 128, zero_point=True)),
        ("int8-g32,max", Scheme(8, 32, search=False)),
        ("int4, max, zero_point", Scheme(4, zero_point=True, search=False)),
    ],
)
def test_schemes_are_read_from_text(text, scheme):
    assert Scheme.parse(text) == scheme


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int2", "begin with"),
        ("int4-s8", "begin with"),
        ("int45", "one of float32"),
        ("int4,group=7", "group size 7"),
        ("int4,fast", "'fast' is none"),
    ],
)
def test_unknown_schemes_are_refused(text, message):
    with pytest.raises(QuantizationError, match=message):
        Scheme.parse(text)


def test_other_bits_are_refused():
    with pytest.raises(QuantizationError, match="8 or 4 bits"):
        Scheme(3)


@pytest.mark.gpu
def test_groups_and_zero_points_survive_on_disk_and_on_a_mesh(tiny_model, tmp_path):
    config, params = tiny_model
    quantized = glm_params.quantize_params(params, Scheme(4, 32, zero_point=True))
    save_model(tmp_path / "model", config, quantized)
    for mesh in (None, make_mesh((1, 2, 2))):
        _, restored = restore(tmp_path / "model", mesh, quantization="int4")
        jax.tree.map(np.testing.assert_array_equal, restored, quantized)
    for other in ("int4,group=64", "int8"):
        with pytest.raises(CheckpointError, match="int4-g32-zp already"):
            restore(tmp_path / "model", quantization=other)


@pytest.mark.parametrize("name", ["float16", "int8", "int4-g128", "int4-g32-zp", "int8-s8"])
def test_formats_have_names(name):
    stored = WeightFormat.parse(name)
    assert stored.name == name
    kernels = [(1024, False), (1024, True), (4096, True)]
    if stored.is_quantized:
        found = [(*kernel, stored.groups(*kernel)) for kernel in kernels]
        assert format_of(stored.dtype, stored.zero_point, found) == stored


@pytest.mark.parametrize("name", ["int5", "int4-g7", "int4-zp-g32", "float16-zp", "int4-s0", "", 3])
def test_unknown_formats_are_refused(name):
    with pytest.raises(QuantizationError, match=r"weight format|group size 7"):
        WeightFormat.parse(name)


def test_a_folder_names_its_format(tiny_model, tmp_path):
    config, params = tiny_model
    quantized = glm_params.quantize_params(params, Scheme(4, 32, search=False))
    save_model(tmp_path / "model", config, quantized)
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    assert content["weight_format"] == "int4-g32"
    assert stored_format(tmp_path / "model") == Scheme(4, 32).format
    wrong = dict.fromkeys(("int8", "int4"), "scales is .*, its config says")
    wrong |= {"float32": "kernel is missing", "int3": "weight format 'int3'"}
    for name, message in wrong.items():
        file.write_text(json.dumps(content | {"weight_format": name}))
        with pytest.raises(CheckpointError, match=message):
            restore(tmp_path / "model")
    content.pop("weight_format")
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r'names no weight_format: add .* "float32"'):
        restore(tmp_path / "model")


@pytest.mark.parametrize(
    ("scheme", "axis", "message"),
    [
        (Scheme(8), 0, "must be negative"),
        (Scheme(8, 32), -2, "do not divide into groups of 32"),
        (Scheme(4), -2, "pairs"),
    ],
)
def test_impossible_quantisation_is_refused(scheme, axis, message):
    with pytest.raises(QuantizationError, match=message):
        quantize(jnp.ones((13, 4)), scheme, axis)
