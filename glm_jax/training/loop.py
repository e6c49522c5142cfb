"""The training loop: data, steps, metrics, checkpoints and the final model.

A run resumes from its newest checkpoint to the bit: a batch is a function of the seed and the
position in the data, which the checkpoint has beside the state.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from glm_jax import processes
from glm_jax.config import ConfigError, GLMConfig
from glm_jax.errors import UserError
from glm_jax.model.flops import training_flops
from glm_jax.sharding import parse_mesh
from glm_jax.tokenizer import Tokenizer
from glm_jax.training import config as train_config
from glm_jax.training import metrics as run_metrics
from glm_jax.training.batches import MeshBatches, describe, open_mixture
from glm_jax.training.checkpoints import RunCheckpoints
from glm_jax.training.metrics import MetricsLogger
from glm_jax.training.recipe import BatchSchedule, Recipe
from glm_jax.training.results import MODEL_FOLDER, refuse_result_of_others, save_trained
from glm_jax.training.state import TrainBatch, TrainState, init_state
from glm_jax.training.step import (
    check_matmul_precision,
    compiled_train_step,
    evaluation_step,
    with_attention_for,
)
from glm_jax.training.stopping import InterruptedRunError, stop_requests
from glm_jax.training.summary import run_summary


class DivergedError(UserError):
    """Steps that stay bad after restores to earlier checkpoints."""


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """What to train: a new model, or one that a checkpoint begins with.

    Attributes:
      config: of the experiment.
      tokenizer: of its data.
      model, recipe: from the config.
      mesh: of the devices to train on.
      begin: returns the state of a new run.
      finish: saves the result of a finished run.
      result: the folder that `finish` writes.
      load_frozen: reads the model beside adapters; returns None if all parameters are trained.
      identity: of the model that the run began with, plain JSON. A run does not resume with
        another model.
    """

    config: ConfigDict
    tokenizer: Tokenizer
    model: GLMConfig
    recipe: Recipe
    mesh: Mesh
    begin: Callable[[], TrainState]
    finish: Callable[[TrainState], None]
    result: Path
    load_frozen: Callable[[], Any] = lambda: None
    identity: Any = None


@dataclasses.dataclass
class _Run:
    """What the steps of a run share.

    Attributes:
      frozen: the model beside adapters, or None.
      consumed: rows drawn from the data before this call, those of skipped steps included.
      profiled: steps to trace.
      restores: since the last checkpoint.
    """

    job: TrainingJob
    frozen: Any
    schedule: BatchSchedule
    batches: MeshBatches
    checkpoints: RunCheckpoints
    logger: MetricsLogger
    evaluation: Any  # a Mixture, or None
    consumed: int
    profiled: range
    restores: int = 0
    is_profiling: bool = False

    @property
    def config(self) -> ConfigDict:
        return self.job.config


def train(config: ConfigDict, workdir: Path, profiled: range = range(0)) -> list[dict[str, Any]]:
    """Train a new model and write the model folder `workdir/model`; see `run_job`.

    Args:
      config: of the experiment; see `training.config`.
      profiled: see `run_job`.

    Returns:
      See `run_job`.

    Raises:
      ConfigError, TokenizerError, MeshError: the experiment is not possible.
    """
    model = train_config.model_config(config)
    train_config.check(config)
    tokenizer = Tokenizer(config.data.tokenizer)
    check_vocabulary(model, tokenizer)
    model = model.replace(special_tokens=tokenizer.special_tokens)
    recipe, mesh = train_config.recipe(config), parse_mesh(config.mesh)
    job = TrainingJob(
        config, tokenizer, model, recipe, mesh,
        begin=lambda: init_state(model, recipe, jax.random.key(config.seed), mesh),
        finish=lambda state: save_trained(workdir, model, state, tokenizer),
        result=workdir / MODEL_FOLDER,
    )  # fmt: skip
    return run_job(job, workdir, profiled)


def run_job(job: TrainingJob, workdir: Path, profiled: range = range(0)) -> list[dict[str, Any]]:
    """Train until the run has seen all rows, from the newest checkpoint in `workdir` if any.

    Writes `workdir/checkpoints`, `metrics.jsonl`, TensorBoard scalars in
    `workdir/tensorboard`, and at the end the job's result.

    Args:
      profiled: steps to write a trace of to `workdir/profile`.

    Returns:
      The metrics logged by this call, a dictionary for each logged step.

    Raises:
      ConfigError, DataError: the experiment is not possible.
      SavingError, InterruptedRunError, DivergedError: the run stopped; its checkpoints stay.
    """
    config, model, mesh = job.config, job.model, job.mesh
    schedule = train_config.batch_schedule(config)
    check_matmul_precision(model, job.recipe, mesh.devices.flat[0])
    sizes = schedule.micro_batch, config.data.sequence_length
    recipe = with_attention_for(model, job.recipe, mesh, *sizes)
    job = dataclasses.replace(job, recipe=recipe)
    mixture = open_mixture(config.data, config, job.tokenizer, schedule.unit)
    evaluation = None
    if config.evaluation.every:
        evaluation = open_mixture(config.evaluation, config, job.tokenizer, schedule.micro_batch)
    batches = MeshBatches(mixture, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    with _closing(RunCheckpoints(workdir / "checkpoints", *_saving(config))) as checkpoints:
        position: dict[str, Any]
        restored = checkpoints.restore_latest(model, recipe, mesh)
        if restored is None:
            refuse_result_of_others(job.result)
        state, position = restored or (
            job.begin(),
            {"consumed": 0, "streams": batches.get_state(), "model": job.identity},
        )
        if position["model"] != job.identity:
            raise ConfigError(
                f"{workdir} is a run of another model or precision: resume it with the checkpoint "
                "that it began with, or name another workdir"
            )
        batches.set_state(position["streams"])
        peak = config.peak_flops or run_metrics.measure_peak_flops(model.compute_dtype)
        done, step = int(state.samples), int(state.step)
        peak *= mesh.size
        with _closing(MetricsLogger(workdir, recipe.total_samples, done, step, peak)) as logger:
            run = _Run(
                job, job.load_frozen(), schedule, batches, checkpoints, logger, evaluation,
                position["consumed"], profiled,
            )  # fmt: skip
            logger.print(run_summary(config, model, mesh))
            logger.print(describe(mixture, recipe.total_samples))
            if restored:
                logger.print(f"resuming from step {step}, whose checkpoint is in {workdir}")
            with jax.set_mesh(mesh):
                state = _steps(run, state, workdir)
    job.finish(state)
    return logger.history


@contextlib.contextmanager
def _closing(thing: Any) -> Iterator[Any]:
    """Close an object at the end; after an error, that error and not one of closing is raised."""
    try:
        yield thing
    except BaseException:
        with contextlib.suppress(Exception):
            thing.close()
        raise
    thing.close()


def _saving(config: ConfigDict) -> tuple[int, float, int, int, bool]:
    return (
        config.checkpoint_every,
        config.checkpoint_minutes,
        config.checkpoints_kept,
        config.checkpoints_kept_every,
        config.checkpoints_strict,
    )


def _steps(run: _Run, state: TrainState, workdir: Path) -> TrainState:
    key = jax.random.key(run.config.seed + 1)
    groups = len(run.batches.groups)
    job = run.job
    train_step = compiled_train_step(job.model, job.recipe, groups, job.mesh)
    drawn = _draw(run, run.consumed)
    with stop_requests() as stopped_by:
        while int(state.samples) < job.recipe.total_samples:
            batch, position = drawn
            with _profile(run, int(state.step) + 1, workdir):
                state, metrics = train_step(state, run.frozen, batch, key)
                # While the devices compute.
                drawn = _draw(run, position["consumed"])
                values = run_metrics.to_plain(jax.device_get(metrics), run.batches.groups)
            rows = batch.tokens.shape[0] * batch.tokens.shape[1]
            run.logger.count(0 if values["is_skipped"] else rows, batch.tokens.size)
            state = _after(run, state, values, position)
            if received := stopped_by(int(state.step)):
                _save(run, state, position)
                run.checkpoints.wait()
                processes.wait("all have saved")
                raise InterruptedRunError(
                    f"stopped by {received.name} after step {int(state.step)}, which is saved: "
                    "the same command resumes the run",
                    received,
                )
    return state


def _draw(run: _Run, consumed: int) -> tuple[TrainBatch, dict[str, Any]]:
    """Return the next batch, and the position in the data after it."""
    accumulation, rows = run.schedule.accumulation(consumed), run.schedule.rows(consumed)
    batch = run.batches.next(accumulation, rows)
    consumed += accumulation * rows
    return batch, {"consumed": consumed, "streams": run.batches.get_state()}


def _after(
    run: _Run, state: TrainState, values: dict[str, Any], position: dict[str, Any]
) -> TrainState:
    """Log, evaluate and save after a step as the config says, or restore after bad steps."""
    step = int(state.step)
    is_last = int(state.samples) >= run.job.recipe.total_samples
    if values["is_skipped"]:
        run.logger.log(step, values)
        run.logger.print(
            f"step {step + 1} skipped: gradient norm {values['gradient_norm']}, loss "
            f"{values['loss']} (None is not finite)"
        )
        return _restored(run, state, int(values["bad_steps"]))
    if step % run.config.log_every == 0 or is_last:
        length, is_frozen = run.config.data.sequence_length, run.frozen is not None
        flops = training_flops(run.job.model, 1, length, is_frozen)
        run.logger.log(step, values, flops)
    elif values["is_spike"]:
        run.logger.log(step, values)
    every = run.config.evaluation.every
    if every and (step % every == 0 or is_last):
        run.logger.log(step, evaluate(run, state))
    if run.checkpoints.should_save(step) or is_last:
        _save(run, state, position)
        run.restores = 0
    return state


def _save(run: _Run, state: TrainState, position: dict[str, Any]) -> None:
    streams = processes.gather(position["streams"])
    run.checkpoints.save(
        int(state.step), state, position | {"streams": streams, "model": run.job.identity}
    )


def _restored(run: _Run, state: TrainState, bad_steps: int) -> TrainState:
    """Return the state, or after too many bad steps that of the last checkpoint."""
    stability = run.config.stability
    if not stability.restore_after or bad_steps < stability.restore_after:
        return state
    restored = run.checkpoints.restore_latest(run.job.model, run.job.recipe, run.job.mesh)
    if restored is None or run.restores >= stability.most_restores:
        why = "before the first checkpoint" if restored is None else "after every restore"
        raise DivergedError(
            f"{bad_steps} steps in a row were skipped {why}: lower the learning rate, or "
            "look at the data of these steps"
        )
    run.restores += 1
    run.logger.print(
        f"{bad_steps} bad steps in a row: going back to the checkpoint of step "
        f"{int(restored[0].step)}, on with later data"
    )
    return restored[0]


def evaluate(run: _Run, state: TrainState) -> dict[str, float]:
    """Return mean losses of held-out samples by dataset and kind; the same samples every time."""
    job = run.job
    batches = MeshBatches(run.evaluation, job.mesh)
    groups = len(batches.groups)
    losses, counts = np.zeros(groups), np.zeros(groups)
    for _ in range(run.config.evaluation.batches):
        sums = evaluation_step(
            state.params, run.frozen, batches.next(1), job.model, job.recipe, groups
        )
        losses += np.asarray(sums["group_losses"])
        counts += np.asarray(sums["group_counts"])
    total = {"evaluation_loss": float(losses.sum() / max(counts.sum(), 1.0))}
    return total | run_metrics.mean_by_group("evaluation_loss", losses, counts, batches.groups)


@contextlib.contextmanager
def _profile(run: _Run, step: int, workdir: Path) -> Iterator[None]:
    """Trace the profiled steps, from the first to the last."""
    if run.profiled and step == run.profiled.start:
        jax.profiler.start_trace(str(workdir / "profile"))
        run.is_profiling = True
    yield
    if run.is_profiling and step >= run.profiled.stop - 1:
        jax.profiler.stop_trace()
        run.is_profiling = False


def check_vocabulary(model: GLMConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if a tokenizer has ids that a model does not have."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size}: --config.model.vocab_size=..."
        )
