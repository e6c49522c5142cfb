"""Configs say what is wrong with them, and survive JSON."""

import dataclasses
import json
import math

import pytest

from glm_jax.config import RANGES, ConfigError, GLMConfig, SpecialTokens, glm_130b, glm_config


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1, "x", None, True, 10**400, [1]])
def test_every_number_of_a_model_has_a_range(bad):
    config = glm_config("tiny")
    numbers = {
        field.name
        for field in dataclasses.fields(config)
        if isinstance(getattr(config, field.name), int | float)
    }
    assert numbers == set(RANGES)
    for name, range_ in RANGES.items():
        with pytest.raises(ConfigError, match=f"^{name}=.*: expected an? "):
            range_.check(name, bad)


def _special(**changed):
    names = [field.name for field in dataclasses.fields(SpecialTokens)]
    ids = dict(zip(names, range(len(names)), strict=True)) | changed
    return f'"special_tokens": {json.dumps(ids)}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"layernorm_epsilon": NaN', "layernorm_epsilon=nan: expected a number from above 0 to 1"),
        ('"layernorm_epsilon": -1', "layernorm_epsilon=-1"),
        ('"rotary_base": 0', "rotary_base=0"),
        ('"rotary_base": Infinity', "rotary_base=inf"),
        ('"hidden_size": 1000000000000000000', "hidden_size=1000000000000000000: expected an int"),
        ('"special_tokens": 3', "special_tokens=3"),
        ('"special_tokens": {"eop": -1}', r"special_tokens\.eop=-1"),
        ('"special_tokens": {"eop": 1.5}', "eop"),
        (_special(eop=4096), r"special_tokens\.eop=4096: the vocabulary ends at 4095"),
        (_special(eop=0), r"special_tokens\.eop=0: mask has the same id"),
    ],
)
def test_nonsense_in_a_model_folder_is_refused(text, message):
    given = glm_config("tiny", vocab_size=4096).to_json()
    name = text.split(":")[0]
    lines = [f"  {text}," if line.strip().startswith(name) else line for line in given.splitlines()]
    fields = "\n".join(lines).replace(",\n}", "\n}")
    assert fields != given
    # An integer for a float is what the tests' own check of types finds first.
    with pytest.raises(ConfigError, match=f"{message}|Type-check error"):
        GLMConfig.from_json(fields)


@pytest.mark.parametrize(
    "field",
    [
        {"norm": "rmsnorm"},
        {"residual": "pre"},
        {"activation": "gelu"},
        {"positions": "learned"},
        {"output_projection": "own"},
        {"num_key_value_heads": 1},
    ],
)
def test_what_no_code_computes_is_refused(field):
    [(name, value)] = field.items()
    with pytest.raises(ConfigError, match=rf"^{name}={value!r}: only .* implemented"):
        glm_config("tiny", **field)
    assert glm_config("tiny", num_key_value_heads=4) != glm_config("tiny")


def test_json_too_deep_to_read_is_refused():
    with pytest.raises(ConfigError, match="not JSON"):
        GLMConfig.from_json("[" * 100_000)


def test_unknown_size_is_refused():
    with pytest.raises(ConfigError, match="model size '7b'"):
        glm_config("7b")
