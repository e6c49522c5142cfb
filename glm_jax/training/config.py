"""The fields of an experiment with their defaults; a file of configs/ sets those that differ."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from glm_jax.config import ConfigError, GLMConfig, Range, glm_config
from glm_jax.data import objective
from glm_jax.data.documents import KINDS_OF_FILES
from glm_jax.data.objective import ObjectiveConfig
from glm_jax.model import adapters
from glm_jax.model.adapters import AdapterConfig
from glm_jax.training import recipe as recipes
from glm_jax.training.recipe import MAX_COUNT, BatchSchedule, Recipe

_OPTIMIZER = (
    "learning_rate",
    "initial_learning_rate",
    "final_learning_rate_fraction",
    "warmup_fraction",
    "beta1",
    "beta2",
    "epsilon",
    "weight_decay",
    "moments",
    "offload_moments",
    "gradient_clip",
    "dropout",
    "attention_dropout",
    "attention",
    "matmul_precision",
    "remat",
    "loss_chunk",
)
_STABILITY = (
    "embedding_gradient",
    "embedding_gradient_samples",
    "z_loss",
    "loss_scaling",
    "loss_scale_window",
    "median_window",
    "skip_factor",
    "spike_loss",
)
_AT_LEAST_0, _AT_LEAST_1 = Range(int, 0, MAX_COUNT), Range(int, 1, MAX_COUNT)
# Of every number of an experiment. Those of its model are in `glm_jax.config.RANGES`.
RANGES = {
    "seed": Range(int, 0, MAX_COUNT),
    "steps": _AT_LEAST_1,
    "data.sequence_length": Range(int, 8, MAX_COUNT),
    "data.batch_size": _AT_LEAST_1,
    "data.micro_batch_size": _AT_LEAST_0,
    "data.initial_batch_size": _AT_LEAST_0,
    "data.ramp_fraction": Range(float, 0, 1),
    "data.ramp_increment": _AT_LEAST_0,
    "data.streams": _AT_LEAST_0,
    "stability.restore_after": _AT_LEAST_0,
    "stability.most_restores": _AT_LEAST_0,
    "evaluation.every": _AT_LEAST_0,
    "evaluation.batches": _AT_LEAST_1,
    "log_every": _AT_LEAST_1,
    "checkpoint_every": _AT_LEAST_1,
    "checkpoint_minutes": Range(float, 0, 1e6),
    "checkpoints_kept": _AT_LEAST_1,
    "checkpoints_kept_every": _AT_LEAST_0,
    "peak_flops": Range(float, 0, 1e21),
    **{f"optimizer.{name}": recipes.RANGES[name] for name in _OPTIMIZER if name in recipes.RANGES},
    **{f"stability.{name}": recipes.RANGES[name] for name in _STABILITY if name in recipes.RANGES},
    **{f"data.objective.{name}": range_ for name, range_ in objective.RANGES.items()},
}
_ADAPTER_RANGES = {f"adapter.{name}": range_ for name, range_ in adapters.RANGES.items()} | {
    "adapter.rank": Range(int, 0, adapters.RANGES["rank"].high)  # 0 for all parameters
}


def default_config(size: str, **model_overrides: object) -> ConfigDict:
    """Return an experiment with a model of a named size; flags can set all fields.

    Raises:
      ConfigError: no such size.
    """
    model = dataclasses.asdict(glm_config(size, **model_overrides))
    model.pop("special_tokens")  # they come with the tokenizer
    fields = run_fields()
    fields["data"]["sequence_length"] = model["max_sequence_length"]
    return ConfigDict(dict(model=model, **fields))


def run_fields() -> dict[str, Any]:
    """Return all fields except those of the model; `field_help` says what each means."""
    recipe = dataclasses.asdict(Recipe(total_samples=1))
    return dict(
        seed=0,
        steps=1000,
        mesh="1,1,1",
        data=dict(
            files="",
            kind="text",
            mixture="",
            tokenizer="",
            sequence_length=2048,
            batch_size=8,
            micro_batch_size=0,
            initial_batch_size=0,
            ramp_fraction=0.025,
            ramp_increment=0,
            streams=0,
            objective=dataclasses.asdict(ObjectiveConfig()),
        ),
        optimizer={name: recipe[name] for name in _OPTIMIZER},
        stability={name: recipe[name] for name in _STABILITY}
        | dict(
            restore_after=10,
            most_restores=5,
        ),
        evaluation=dict(files="", kind="text", mixture="", every=0, batches=8),
        log_every=10,
        checkpoint_every=500,
        checkpoint_minutes=0.0,
        checkpoints_kept=2,
        checkpoints_kept_every=0,
        checkpoints_strict=False,
        peak_flops=0.0,
    )


def model_config(config: ConfigDict) -> GLMConfig:
    """Return the model of an experiment, without special tokens."""
    return GLMConfig.from_dict(config.model.to_dict())


def recipe(config: ConfigDict) -> Recipe:
    """Return the recipe of an experiment.

    Raises:
      ConfigError: a value is out of range.
    """
    fields = {name: config.optimizer[name] for name in _OPTIMIZER}
    fields |= {name: config.stability[name] for name in _STABILITY}
    if config.get("adapter", {}).get("rank"):
        fields["adapter"] = adapter(config)
    return Recipe(total_samples=config.steps * config.data.batch_size, **fields)


def adapter(config: ConfigDict) -> AdapterConfig:
    """Return the adapters of a fine-tuning experiment.

    Raises:
      ConfigError: a value is out of range.
    """
    fields = config.adapter.to_dict()
    targets = tuple(name.strip() for name in fields.pop("targets").split(","))
    return AdapterConfig(targets=targets, **fields)


def batch_schedule(config: ConfigDict) -> BatchSchedule:
    """Return the batch sizes of an experiment.

    Raises:
      ConfigError: sizes do not divide.
    """
    data = config.data
    initial = data.initial_batch_size or data.batch_size
    return BatchSchedule(
        final=data.batch_size,
        initial=initial,
        ramp_samples=round(data.ramp_fraction * config.steps * data.batch_size),
        increment=data.ramp_increment or initial,
        micro_batch=data.micro_batch_size or initial,
    )


def check_fields(config: ConfigDict) -> None:
    """Check each field by itself.

    Raises:
      ConfigError: a field is missing, of another type, or out of range; names the field.
    """
    ranges = RANGES | (_ADAPTER_RANGES if "adapter" in config else {})
    for name, default in _flat(run_fields()).items():
        value = _field(config, name)
        if name not in ranges and type(value) is not type(default):
            raise ConfigError(
                f"{name}={value!r}: expected {type(default).__name__}, such as {default!r}"
            )
    for name, range_ in ranges.items():
        range_.check(name, _field(config, name))


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to names such as data.kind."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        is_inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if is_inner else {prefix + name: value}
    return flat


def _field(config: ConfigDict, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, ConfigDict) or part not in value:
            raise ConfigError(f"{name} is missing from the experiment")
        value = value[part]
    return value


def check(config: ConfigDict) -> None:
    """Check fields, also against each other, that would fail late or train on nothing.

    Raises:
      ConfigError: names the field.
    """
    check_fields(config)
    if bool(config.data.files) == bool(config.data.mixture):
        raise ConfigError(
            "data.files is not set, nor data.mixture: --config.data.files=... or "
            "--config.data.mixture=..., one of them"
        )
    if not config.data.tokenizer:
        raise ConfigError("data.tokenizer is not set: --config.data.tokenizer=...")
    if config.evaluation.every and bool(config.evaluation.files) == bool(config.evaluation.mixture):
        raise ConfigError(
            "evaluation.every is set: --config.evaluation.files=... or mixture=..., one of them"
        )
    for source in (config.data, config.evaluation):
        if source.kind not in KINDS_OF_FILES:
            raise ConfigError(f"kind={source.kind!r}, of files: one of {KINDS_OF_FILES}")
    length, positions = config.data.sequence_length, config.model.max_sequence_length
    if not 8 <= length <= positions:
        raise ConfigError(f"data.sequence_length={length}: from 8 to the model's {positions}")
    rows = config.steps * config.data.batch_size
    if rows > MAX_COUNT:
        raise ConfigError(f"steps x data.batch_size={rows}: at most {MAX_COUNT} rows")
    recipe(config)
    batch_schedule(config)
