"""Properties of the model: reference, caches, packing, extreme values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config import MODEL_SIZES, glm_130b, glm_config
from glm_jax.kernels.attention.api import attention
from glm_jax.kernels.attention.reference import ranges_to_mask
from glm_jax.model import glm
from glm_jax.model import params as glm_params
from glm_jax.model.visibility import Visibility

forward = jax.jit(glm.forward, static_argnames="config")


def _reference_logits(params, config, tokens, mask):
    """The whole model in float64 numpy, written from the paper's formulas."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    heads, head_dim = config.num_heads, config.head_dim
    gelu = np.vectorize(lambda g: 0.5 * g * (1 + math.erf(g / math.sqrt(2))))

    def norm(x, n, i=...):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * n.scale[i] + n.bias[i]

    def rotate(x):
        frequency = 10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
        turn = np.exp(1j * np.arange(len(x))[:, None] * frequency)[:, None]
        z = (x[..., : head_dim // 2] + 1j * x[..., head_dim // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    x = p.word_embeddings[tokens]
    for i in range(config.num_layers):
        layer = p.layers
        h = norm(x, layer.input_layernorm, i)
        qkv = np.einsum("se,ehcd->shcd", h, layer.query_key_value.kernel[i])
        q, k, v = np.moveaxis(qkv + layer.query_key_value.bias[i], 2, 0)
        scores = np.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / math.sqrt(head_dim)
        weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        weights /= weights.sum(-1, keepdims=True)
        merged = np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), heads * head_dim)
        x = h * config.residual_scale + merged @ layer.dense.kernel[i] + layer.dense.bias[i]
        h = norm(x, layer.post_attention_layernorm, i)
        u, g = (
            np.einsum("se,ecm->csm", h, layer.dense_h_to_4h.kernel[i])
            + (layer.dense_h_to_4h.bias[i][:, None])
        )
        out = (u * gelu(g)) @ layer.dense_4h_to_h.kernel[i] + layer.dense_4h_to_h.bias[i]
        x = h * config.residual_scale + out
    return norm(x, p.final_layernorm) @ p.word_embeddings.T


def _inputs(config, batch, length, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (batch, length), np.int32)
    return tokens, np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)


def test_equals_a_float64_reference(tiny_model):
    config, params = tiny_model
    # Biases and scales away from their trivial initial values.
    params = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    tokens, position_ids = _inputs(config, 1, 12)
    visibility = Visibility.prefix(np.array([5], np.int32), 12)
    got = forward(params, config, tokens, position_ids, visibility)[0]
    mask = np.asarray(ranges_to_mask(visibility.key_ranges, 12))[0]
    np.testing.assert_allclose(got, _reference_logits(params, config, tokens[0], mask), atol=2e-4)


def test_parameter_count_of_130b():
    assert glm_params.parameter_count(glm_130b()) == 128_697_794_560


@pytest.mark.parametrize("size", [s for s in MODEL_SIZES if s not in ("tiny", "130b")])
def test_sizes_are_what_their_names_say(size):
    unit = {"m": 1e6, "b": 1e9}[size[-1]]
    count = glm_params.parameter_count(glm_config(size))
    assert count == pytest.approx(float(size[:-1]) * unit, rel=0.13)


def test_packed_texts_equal_each_alone(tiny_model):
    config, params = tiny_model
    tokens, _ = _inputs(config, 1, 20)
    segment_ids = np.array([[1] * 7 + [2] * 4 + [3] * 6 + [0] * 3], np.int32)
    context = np.array([[3] * 7 + [1] * 4 + [6] * 6 + [0] * 3], np.int32)
    position_ids = np.array([[*range(7), *range(4), *range(6), 0, 0, 0]], np.int32)
    packed = forward(params, config, tokens, position_ids, Visibility.packed(segment_ids, context))
    for start, stop, length in ((0, 7, 3), (7, 11, 1), (11, 17, 6)):
        alone = forward(
            params,
            config,
            tokens[:, start:stop],
            position_ids[:, start:stop],
            Visibility.prefix(np.array([length], np.int32), stop - start),
        )
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-5)


def test_choices_after_one_context_equal_each_alone(tiny_model):
    config, params = tiny_model
    tokens, _ = _inputs(config, 1, 12)
    choice_ids = np.array([[0] * 5 + [1] * 3 + [2] * 4], np.int32)
    position_ids = np.array([[*range(5), *range(5, 8), *range(5, 9)]], np.int32)
    together = forward(params, config, tokens, position_ids, Visibility.choices(choice_ids))
    for choice in (1, 2):
        kept = np.flatnonzero((choice_ids[0] == 0) | (choice_ids[0] == choice))
        alone = forward(
            params,
            config,
            tokens[:, kept],
            position_ids[:, kept],
            Visibility.prefix(np.array([5], np.int32), len(kept)),
        )
        own = np.flatnonzero(choice_ids[0] == choice)
        np.testing.assert_allclose(together[:, own], alone[:, 5:], atol=1e-5)


def test_attention_of_a_row_that_sees_nothing_is_zero_and_has_a_gradient():
    query = jnp.ones((1, 2, 1, 4))
    key = value = jnp.ones((1, 1, 3, 4))
    ranges = jnp.array([[[0, 0, 0, 0], [0, 2, 0, 0]]], jnp.int32)
    out = attention(query, key, value, ranges)
    np.testing.assert_allclose(out[0, :, 0, 0], [0.0, 1.0])
    gradient = jax.grad(lambda q: attention(q, key, value, ranges).sum())(query)
    assert np.isfinite(gradient).all()


def test_float16_attention_does_not_overflow():
    """Scores of 90,000 before the division: past float16 if formed there."""
    query = jnp.full((1, 1, 1, 4), 150.0, jnp.float16)
    key = jnp.stack([jnp.full((4,), 150.0), jnp.full((4,), 149.0)]).astype(jnp.float16)[None, None]
    value = jnp.array([[1.0] * 4, [0.0] * 4], jnp.float16)[None, None]
    out = attention(query, key, value, jnp.array([[[0, 2, 0, 0]]], jnp.int32))
    np.testing.assert_allclose(out, np.ones_like(out))
