"""The model computes what the original computes."""

import functools

import jax
import numpy as np
import pytest
from conftest import GOLDEN, load_golden

from glm_jax.model import glm
from glm_jax.model.layer_stacks import unstack_layers
from glm_jax.model.layers import rotary_tables
from glm_jax.model.visibility import Visibility

pytestmark = pytest.mark.gpu

CASES = ("gmask_prefix", "mask_blank", "bidirectional", "unidirectional", "ragged_prefix")
PRECISIONS = ("float16", "int8_tp1", "int8_tp8", "int4_tp1", "int4_tp8")

forward = jax.jit(glm.forward, static_argnames="config")


@functools.cache
def _model(folder, dtype):
    return load_golden(folder, dtype)


def _logits(golden, case, folder, dtype):
    config, params = _model(folder, dtype)
    return np.asarray(
        forward(
            params,
            config,
            golden[f"{case}/tokens"],
            golden[f"{case}/position_ids"],
            ~golden[f"{case}/masked"],
        )
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("folder", ["tp1", "tp2", "tp4", "tp8"])
def test_float32_logits_equal_the_originals(golden_logits, case, folder):
    got = _logits(golden_logits, case, folder, "float32")
    np.testing.assert_allclose(got, golden_logits[f"{case}/logits_float32"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_low_precision_logits_equal_the_originals(golden_logits, case, precision):
    folder = "tp1" if precision == "float16" else precision
    got = _logits(golden_logits, case, folder, "float16")
    np.testing.assert_allclose(got, golden_logits[f"{case}/logits_{precision}"], atol=3e-2, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_float16_is_no_further_from_float32_than_three_times_the_original(golden_logits, case):
    exact = golden_logits[f"{case}/logits_float32"]
    ours = np.abs(_logits(golden_logits, case, "tp1", "float16") - exact).max()
    originals = np.abs(golden_logits[f"{case}/logits_float16"] - exact).max()
    assert ours <= 3 * originals


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_close_as_its_eight_times_coarser_rounding(golden_logits, case):
    exact = golden_logits[f"{case}/logits_float32"]
    ours = np.abs(_logits(golden_logits, case, "tp1", "bfloat16") - exact).max()
    float16 = np.abs(golden_logits[f"{case}/logits_float16"] - exact).max()
    assert ours <= 3 * 8 * float16


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_unrolled_layers_give_the_logits_of_scanned_ones(golden_logits, dtype):
    config, params = _model("tp1", dtype)
    case = "ragged_prefix"
    args = [golden_logits[f"{case}/{n}"] for n in ("tokens", "position_ids")]
    mask = ~golden_logits[f"{case}/masked"]
    scanned = forward(params, config, *args, mask)
    unrolled = forward(unstack_layers(params), config, *args, mask)
    np.testing.assert_allclose(unrolled, scanned, atol=1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize(
    ("case", "context_length"),
    [
        ("gmask_prefix", [22, 22]),
        ("mask_blank", [22, 22]),
        ("bidirectional", [40, 40]),
        ("unidirectional", [0, 0]),
        ("ragged_prefix", [20, 35]),
    ],
)
def test_visibility_equals_the_masks_of_the_original(golden_logits, case, context_length):
    config, params = _model("tp1", "float32")
    visibility = Visibility.prefix(np.array(context_length, np.int32), 40)
    args = [golden_logits[f"{case}/{n}"] for n in ("tokens", "position_ids")]
    got = forward(params, config, *args, visibility)
    np.testing.assert_allclose(got, golden_logits[f"{case}/logits_float32"], atol=2e-4, rtol=0)


def test_rotary_tables_equal_the_released_ones():
    config, _ = _model("tp1", "float16")
    inv_freq, cos, sin = rotary_tables(config.replace(max_sequence_length=2048))
    with np.load(GOLDEN / "rotary.npz") as golden:
        np.testing.assert_array_equal(inv_freq, golden["inv_freq"])
        np.testing.assert_array_equal(np.tile(cos, 2), golden["cos_float16"])
        expected = golden["sin_float16"]
    ulps = np.abs(np.tile(sin, 2).view(np.int16).astype(int) - expected.view(np.int16))
    assert ulps.max() <= 1
    assert (ulps > 0).mean() <= 1e-3


def test_float32_rotary_is_exact_where_float16_is_not():
    config, _ = _model("tp1", "float16")
    config = config.replace(max_sequence_length=2048)
    angles = np.arange(2048)[:, None] * 10000.0 ** -(np.arange(0, 8, 2) / 8)
    _, cos, _ = rotary_tables(config.replace(rotary_dtype="float32"))
    np.testing.assert_allclose(cos, np.cos(angles), atol=2e-4)
    _, rounded, _ = rotary_tables(config)
    assert np.abs(rounded - np.cos(angles)).max() > 0.05
