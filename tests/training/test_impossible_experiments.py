"""Experiments that cannot be are refused before anything is read."""

import math

import pytest

from glm_jax.config import ConfigError
from glm_jax.training import config as train_config
from glm_jax.training import finetuning
from glm_jax.training.config import check, default_config
from glm_jax.training.loop import train


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps=0"),
        ("data.files", "", "data.files is not set"),
        ("data.sequence_length", 4096, "data.sequence_length=4096"),
        ("data.batch_size", 0, "data.batch_size=0"),
        ("data.micro_batch_size", 3, "no multiple of micro_batch_size=3"),
        ("data.initial_batch_size", 8, "initial_batch_size=8 is more than batch_size=4"),
        ("optimizer.remat", "all", "remat='all'"),
        ("optimizer.attention", "flash", "attention='flash': one of"),
        ("optimizer.dropout", 1.5, "dropout=1.5"),
        ("evaluation.every", 5, "evaluation.every is set"),
    ],
)
def test_impossible_experiments_are_refused(experiment, field, value, message):
    with experiment.unlocked():
        experiment.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        check(experiment)


_BAD = (math.nan, math.inf, -math.inf, -1, "x", None, True, 10**400, [1])


@pytest.mark.parametrize("make", [lambda: default_config("tiny"), finetuning.default_config])
def test_every_number_of_an_experiment_has_a_range(make):
    config = make()
    fields = train_config._flat(config.to_dict())
    numbers = [n for n, v in fields.items() if isinstance(v, int | float) and type(v) is not bool]
    assert len(numbers) > 40
    for name in numbers:
        for bad in _BAD:
            with config.unlocked(), config.ignore_type():
                config.update_from_flattened_dict({name: bad})
            # Of a model's fields the tests' own check of types says the name too.
            with pytest.raises(ConfigError, match=rf"\b{name.removeprefix('model.')}\b"):
                check_all(config)
        with config.unlocked(), config.ignore_type():
            config.update_from_flattened_dict({name: fields[name]})
    for name in set(fields) - set(numbers):
        if not name.startswith(("model.", "adapter.", "quantization")):
            with config.unlocked(), config.ignore_type():
                config.update_from_flattened_dict({name: None})
            with pytest.raises(ConfigError, match=f"^{name}=None"):
                train_config.check_fields(config)
            with config.unlocked(), config.ignore_type():
                config.update_from_flattened_dict({name: fields[name]})
    del config.data.objective
    with pytest.raises(ConfigError, match=r"data\.objective.* is missing"):
        train_config.check_fields(config)


def check_all(config):
    if "num_layers" in config.model:
        train_config.model_config(config)
    train_config.check_fields(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer.beta1", 1.0),
        ("optimizer.beta2", 2),
        ("optimizer.learning_rate", 0),
        ("optimizer.epsilon", 0),
        ("optimizer.gradient_clip", 0),
        ("stability.skip_factor", 0.5),
        ("data.objective.masked_tokens", 1.1),
        ("model.layernorm_epsilon", 0.0),
        ("model.rotary_base", 0),
        ("steps", 2**31),
    ],
)
def test_numbers_at_the_edges_of_their_ranges_are_refused(experiment, field, value):
    with experiment.unlocked(), experiment.ignore_type():
        experiment.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=field.split(".")[-1]):
        check_all(experiment)


def test_rows_that_programs_cannot_count_are_refused(experiment):
    experiment.steps, experiment.data.batch_size = 2**30, 4
    with pytest.raises(ConfigError, match=r"steps x data\.batch_size=4294967296"):
        check(experiment)


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(experiment, tmp_path):
    experiment.model.vocab_size = 512
    with pytest.raises(ConfigError, match=r"model\.vocab_size=512 is less than the tokenizer's"):
        train(experiment, tmp_path / "run")
