"""Configs say what is wrong with them, and survive JSON."""

import pytest

from glm_jax.config import ConfigError, GLMConfig, SpecialTokens, glm_130b, glm_config


def test_json_round_trip():
    config = glm_130b()
    assert GLMConfig.from_json(config.to_json()) == config
    assert hash(GLMConfig.from_json(config.to_json())) == hash(config)


def test_released_layout():
    config = glm_130b()
    assert (config.num_layers, config.hidden_size, config.inner_hidden_size) == (70, 12288, 32768)
    assert (config.num_heads, config.vocab_size, config.head_dim) == (96, 150528, 128)
    assert config.residual_scale == pytest.approx(140**0.5)
    assert config.special_tokens == SpecialTokens(mask=150000, gmask=150001, eos=20002)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "does not divide into num_heads=5"),
        ({"num_heads": 128}, "odd"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"compute_dtype": "float64"}, "compute_dtype='float64'"),
        ({"rotary_dtype": "bfloat16"}, "rotary_dtype"),
    ],
)
def test_impossible_models_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        glm_config("tiny", **fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"depth": 3}', "unknown field 'depth'"),
        ('{"num_layers": 3}', "missing"),
    ],
)
def test_broken_json_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        GLMConfig.from_json(text)


def test_unknown_size_is_refused():
    with pytest.raises(ConfigError, match="model size '7b'"):
        glm_config("7b")
