"""The fields of an experiment, with defaults; configs/*.py set what differs."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from glm_jax.config import ConfigError, GLMConfig, glm_config
from glm_jax.data.objective import ObjectiveConfig


def default_config(size: str, **model_overrides: Any) -> ConfigDict:
    """An experiment with a model of a named size; all fields can be set by flags.

    Raises:
      ConfigError: no such size.
    """
    model = dataclasses.asdict(glm_config(size, **model_overrides))
    model.pop("special_tokens")  # they come with the tokenizer
    return ConfigDict(
        dict(
            model=model,
            seed=0,
            steps=1000,
            mesh="1,1,1",
            data=dict(
                files="",  # comma-separated paths and patterns
                tokenizer="",  # folder that launch/train_tokenizer.py wrote
                sequence_length=model["max_sequence_length"],
                batch_size=8,
                objective=dataclasses.asdict(ObjectiveConfig()),
            ),
            optimizer=dict(
                learning_rate=8e-5,
                initial_learning_rate=1e-7,
                final_learning_rate_fraction=0.1,
                warmup_fraction=0.005,
                beta1=0.9,
                beta2=0.95,
                epsilon=1e-8,
                weight_decay=0.1,
                gradient_clip=1.0,
            ),
            log_every=10,
            checkpoint_every=500,
            checkpoints_kept=2,
        )
    )


def model_config(config: ConfigDict) -> GLMConfig:
    """The model of an experiment, without special tokens."""
    fields = config.model.to_dict()
    return GLMConfig.from_dict(fields)


def check(config: ConfigDict) -> None:
    """Refuses values that would fail late or train in silence on nothing.

    Raises:
      ConfigError: names the field.
    """
    positive = ("steps", "log_every", "checkpoint_every", "checkpoints_kept")
    for name in positive:
        if config[name] < 1:
            raise ConfigError(f"{name}={config[name]}: at least 1")
    for name in ("files", "tokenizer"):
        if not config.data[name]:
            raise ConfigError(f"data.{name} is not set: --config.data.{name}=...")
    length, positions = config.data.sequence_length, config.model.max_sequence_length
    if not 8 <= length <= positions:
        raise ConfigError(f"data.sequence_length={length}: from 8 to the model's {positions}")
    if config.data.batch_size < 1:
        raise ConfigError(f"data.batch_size={config.data.batch_size}: at least 1")
