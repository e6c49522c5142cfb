"""An embedding is the mean of the hidden states of a text's tokens, whatever shares its batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.engine.embedding import Embedder, embedded_sequence, mean_hidden
from glm_jax.engine.scoring import ScoringError
from glm_jax.engine.stepwise import finish
from glm_jax.model import glm
from glm_jax.model import params as glm_params
from glm_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def texts(golden_float32):
    rng = np.random.default_rng(0)
    lengths = [1, 2, 63, *rng.integers(1, 40, 80)]
    return [rng.integers(5, 400, length).tolist() for length in lengths]


def _direct(config, params, tokens):
    """The text and [gMASK], each of which sees all; without rows, ranges or padding."""
    context = jnp.array([[*tokens, config.special_tokens.gmask]])
    length = context.shape[1]
    seen = jnp.ones((1, length, length), bool)
    forward_hidden = jax.jit(glm.forward_hidden, static_argnums=1)
    hidden, _ = forward_hidden(params, config, context, jnp.arange(length)[None], seen)
    return np.asarray(hidden[0, :-1], np.float64).mean(axis=0)


def _embed(config, params, texts):
    embedder = Embedder(params, config, 512)
    sequences = [embedded_sequence(tokens, config.special_tokens) for tokens in texts]
    results = finish(embedder.steps(sequences))
    assert [each.number for each in results] == list(range(len(texts)))
    return np.stack([each.values for each in results])


@pytest.fixture(scope="module")
def together(golden_float32, texts):
    config, params = golden_float32
    return _embed(config, params, texts)


def test_embeddings_are_means_of_hidden_states(golden_float32, texts, together):
    config, params = golden_float32
    before = mean_hidden._cache_size()
    for number in (0, 2, len(texts) - 1):
        direct = _direct(config, params, texts[number])
        np.testing.assert_allclose(together[number], direct, atol=2e-5)
    for number in range(4):
        [alone] = _embed(config, params, [texts[number]])
        np.testing.assert_allclose(alone, together[number], atol=2e-5)
    assert mean_hidden._cache_size() == before  # one shape for all of them


def test_embeddings_are_the_same_on_a_mesh(golden_float32, texts, together):
    config, params = golden_float32
    like = glm_params.abstract(config, make_mesh((2, 2, 2)))
    sharded = jax.device_put(params, jax.tree.map(lambda a: a.sharding, like))
    np.testing.assert_allclose(_embed(config, sharded, texts[:5]), together[:5], atol=5e-5)


def test_a_model_without_numbers_embeds_nothing(golden_float32, texts):
    config, params = golden_float32
    broken = dataclasses.replace(params, word_embeddings=params.word_embeddings * jnp.nan)
    with pytest.raises(ScoringError, match="hidden states are not finite"):
        _embed(config, broken, texts[:1])
