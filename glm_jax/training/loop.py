"""A whole run: data, steps, metrics, checkpoints and the finished model."""

import contextlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tensorboardX
from ml_collections import ConfigDict
from tqdm import tqdm

from glm_jax.config import ConfigError, GLMConfig
from glm_jax.data import documents, pipeline
from glm_jax.data.objective import ObjectiveConfig
from glm_jax.model.checkpoint import save_model
from glm_jax.sharding import activation_sharding, parse_mesh
from glm_jax.tokenizer import Tokenizer
from glm_jax.training import config as train_config
from glm_jax.training.checkpoints import RunCheckpoints
from glm_jax.training.optimizer import learning_rate, make_optimizer
from glm_jax.training.state import TrainState, abstract_state, init_state
from glm_jax.training.step import Batch, train_step

MODEL_FOLDER = "model"


def train(config: ConfigDict, workdir: Path) -> list[dict[str, float]]:
    """Trains until `config.steps`, going on from the newest checkpoint in `workdir`.

    Writes `workdir/checkpoints`, TensorBoard scalars in `workdir/tensorboard`, and at the
    end the model folder `workdir/model`.

    Returns:
      The logged scalars of this call, one dictionary per logged step.

    Raises:
      ConfigError, DataError, TokenizerError, MeshError: what was asked for cannot be.
    """
    train_config.check(config)
    tokenizer = Tokenizer(config.data.tokenizer)
    model = _model_for(config, tokenizer)
    mesh = parse_mesh(config.mesh)
    batches = _batches(config, tokenizer)
    optimizer = make_optimizer(config.optimizer, config.steps)
    # Closing waits for saves that are under way, also when a step fails.
    with (
        contextlib.closing(
            RunCheckpoints(
                workdir / "checkpoints", config.checkpoint_every, config.checkpoints_kept
            )
        ) as checkpoints,
        contextlib.closing(tensorboardX.SummaryWriter(str(workdir / "tensorboard"))) as writer,
    ):
        restored = checkpoints.restore_latest(abstract_state(model, optimizer, mesh))
        if restored is None:
            state = init_state(model, optimizer, jax.random.key(config.seed), mesh)
        else:
            state, data_state = restored
            batches.set_state(data_state)
        with jax.set_mesh(mesh):
            state, history = _run(config, model, optimizer, state, batches, checkpoints, writer)
    if not (workdir / MODEL_FOLDER).exists():
        save_model(workdir / MODEL_FOLDER, model, state.params, tokenizer.files)
    return history


def _run(
    config: ConfigDict,
    model: GLMConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batches: Any,
    checkpoints: RunCheckpoints,
    writer: tensorboardX.SummaryWriter,
) -> tuple[TrainState, list[dict[str, float]]]:
    schedule = learning_rate(config.optimizer, config.steps)
    step, history = int(state.step), []
    tokens_per_step = config.data.batch_size * config.data.sequence_length
    began, counted = time.perf_counter(), step
    bar = tqdm(total=config.steps, initial=step, desc="training", unit="step")
    while step < config.steps:
        state, metrics = train_step(state, _on_mesh(next(batches)), model, optimizer)
        step += 1
        bar.update()
        if step % config.log_every == 0 or step == config.steps:
            scalars = {name: float(value) for name, value in metrics.items()}
            now = time.perf_counter()
            scalars["tokens_per_second"] = (step - counted) * tokens_per_step / (now - began)
            scalars["learning_rate"] = float(schedule(step - 1))
            began, counted = now, step
            for name, value in scalars.items():
                writer.add_scalar(f"train/{name}", value, step)
            bar.set_postfix(
                loss=f"{scalars['loss']:.3f}", tok_s=f"{scalars['tokens_per_second']:.0f}"
            )
            history.append({"step": float(step)} | scalars)
        if checkpoints.is_due(step) or step == config.steps:
            checkpoints.save(step, state, batches.get_state())
    bar.close()
    return state, history


def _model_for(config: ConfigDict, tokenizer: Tokenizer) -> GLMConfig:
    model = train_config.model_config(config)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size}: --config.model.vocab_size=..."
        )
    return model.replace(special_tokens=tokenizer.special_tokens)


def _batches(config: ConfigDict, tokenizer: Tokenizer) -> Any:
    length = config.data.sequence_length
    windows = documents.tokenize(
        documents.find_files(config.data.files), tokenizer, pipeline.window_length(length)
    )
    return pipeline.packed_batches(
        windows,
        tokenizer.special_tokens,
        ObjectiveConfig(**config.data.objective.to_dict()),
        sequence_length=length,
        batch_size=config.data.batch_size,
        seed=config.seed,
    )


def _on_mesh(features: dict[str, np.ndarray]) -> Batch:
    mesh = jax.sharding.get_mesh()
    sharding = activation_sharding(mesh, ("batch", "seq"))
    return Batch(**jax.device_put(features, sharding))
