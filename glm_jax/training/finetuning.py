"""Fine-tuning: a run that begins with a checkpoint, and trains adapters beside it or all of it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from glm_jax.checkpoints.adapter_folder import check_adapter, model_identity, save_adapter
from glm_jax.checkpoints.model_folder import load_config, restore, stored_format
from glm_jax.config import ConfigError, GLMConfig
from glm_jax.model.adapters import AdapterConfig
from glm_jax.model.gpu_layout import layout_of_parts
from glm_jax.model.layer_stacks import unstack_layers
from glm_jax.model.params import GLMParams
from glm_jax.sharding import parse_mesh
from glm_jax.tokenizer import Tokenizer, check_fits
from glm_jax.training import config as train_config
from glm_jax.training.loop import TrainingJob, run_job
from glm_jax.training.results import MODEL_FOLDER, replace_result, save_trained
from glm_jax.training.state import TrainState, init_state, start_state, takes_layers_apart

ADAPTER_FOLDER = "adapter"
_FORMATS = ("param_dtype", "compute_dtype")


def default_config(**adapter: Any) -> ConfigDict:
    """Return a fine-tuning experiment: its model, except for dtypes, is the checkpoint's.

    Args:
      adapter: fields of `AdapterConfig` that differ; rank=0 to train all parameters.
    """
    fields = train_config.run_fields()
    described = dataclasses.asdict(AdapterConfig()) | adapter
    described["targets"] = ",".join(described["targets"])
    config = ConfigDict(
        dict(
            model=dict(
                param_dtype="float32",  # of trained parameters
                compute_dtype="bfloat16",  # of activations, and of frozen floats
            ),
            quantization="",  # of a frozen float model: int8, int4, int4,group=128
            adapter=described,
            **fields,
        )
    )
    config.data.kind = config.evaluation.kind = "instructions"
    config.data.sequence_length = 1024
    # Dropout and a smaller embedding gradient are for training from scratch.
    config.optimizer.dropout = config.optimizer.attention_dropout = 0.0
    config.stability.embedding_gradient = 1.0
    config.optimizer.warmup_fraction = 0.03
    config.optimizer.weight_decay = 0.0
    config.optimizer.remat = "blocks"
    return config


def finetune(
    config: ConfigDict, checkpoint: Path, workdir: Path, profiled: range = range(0)
) -> list[dict[str, Any]]:
    """Train a model further and write `workdir/adapter`, or `workdir/model` for all parameters.

    Args:
      config: see `default_config`.
      checkpoint: a model folder; of a quantised one only adapters can be trained.
      profiled: see `loop.run_job`.

    Returns:
      See `loop.run_job`.

    Raises:
      ConfigError, CheckpointError, QuantizationError, MeshError: the experiment is not possible.
    """
    train_config.check_fields(config)
    stored = load_config(checkpoint)
    config = resolved(config, checkpoint, stored)
    train_config.check(config)
    tokenizer = Tokenizer(config.data.tokenizer)
    check_fits(tokenizer, stored)
    model = stored.replace(**_formats(config))
    recipe, mesh = train_config.recipe(config), parse_mesh(config.mesh)
    identity = model_identity(checkpoint, stored)
    quantization = config.quantization or None
    is_whole = recipe.adapter is None
    is_stacked = not takes_layers_apart(model, mesh)
    if is_whole and (quantization or stored_format(checkpoint).is_quantized):
        raise ConfigError(
            "adapter.rank=0 trains all parameters, which integers are not: give a float "
            "checkpoint and no quantization, or a rank"
        )

    def begin() -> TrainState:
        if not is_whole:
            return init_state(model, recipe, jax.random.key(config.seed), mesh)
        _, params = restore(checkpoint, mesh, model.param_dtype, is_stacked=is_stacked)
        return start_state(params, model, recipe, mesh)

    def load_frozen() -> GLMParams | None:
        if is_whole:
            return None
        _, frozen = restore(
            checkpoint, mesh, model.compute_dtype, quantization, is_stacked=is_stacked,
            layout=layout_of_parts(mesh),
        )  # fmt: skip
        # Once, not in every step.
        return frozen if is_stacked else unstack_layers(frozen)

    def finish(state: TrainState) -> None:
        trained: Any = state.params
        if recipe.adapter is None:
            save_trained(workdir, model, state, tokenizer)
            return
        adapter = recipe.adapter
        write = lambda folder: save_adapter(folder, adapter, trained, identity)
        replace_result(workdir / ADAPTER_FOLDER, int(state.step), write, check_adapter)

    job = TrainingJob(
        config, tokenizer, model, recipe, mesh, begin, finish,
        workdir / (MODEL_FOLDER if is_whole else ADAPTER_FOLDER), load_frozen,
        identity | {"quantization": quantization},
    )  # fmt: skip
    return run_job(job, workdir, profiled)


def resolved(config: ConfigDict, checkpoint: Path, stored: GLMConfig) -> ConfigDict:
    """Return a fine-tuning config completed by the checkpoint: model, and tokenizer if unset."""
    whole = ConfigDict(config.to_dict())
    model = dataclasses.asdict(stored) | _formats(config)
    model.pop("special_tokens")
    whole.model = ConfigDict(model)
    whole.data.tokenizer = config.data.tokenizer or str(checkpoint)
    return whole


def _formats(config: ConfigDict) -> dict[str, str]:
    return {name: config.model[name] for name in _FORMATS}


def outcome(workdir: Path) -> str:
    """Say in words where the result of a finished run is."""
    if (workdir / ADAPTER_FOLDER).exists():
        return f"the adapters are in {workdir / ADAPTER_FOLDER}"
    return f"the model is in {workdir / MODEL_FOLDER}"
