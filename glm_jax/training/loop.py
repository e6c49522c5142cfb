"""A whole run: data, steps, metrics, checkpoints and the finished model."""

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
from glm_jax.sharding import parse_mesh
from glm_jax.tokenizer import Tokenizer
from glm_jax.training import config as train_config
from glm_jax.training import metrics as run_metrics
from glm_jax.training.batches import MeshBatches, describe, open_mixture
from glm_jax.training.checkpoints import RunCheckpoints
from glm_jax.training.metrics import Watcher
from glm_jax.training.recipe import BatchSchedule, Recipe
from glm_jax.training.results import MODEL_FOLDER, refuse_result_of_others, save_trained
from glm_jax.training.state import Batch, TrainState, init_state
from glm_jax.training.step import compiled_train_step, evaluation_step
from glm_jax.training.stopping import InterruptedRunError, stop_requests


class DivergedError(UserError):
    """Steps that stay bad whatever data is passed over."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, how, and what becomes of it.

    Attributes:
      config: the experiment's.
      tokenizer: of its data.
      model, recipe: the config's, once and for all.
      mesh: where it runs.
      begin: gives the state of a run that begins.
      finish: keeps what was learnt, once the run has ended.
      result: the folder that `finish` writes.
      load_frozen: reads the model beside the adapters that are trained; None where all of it is.
      identity: of the model that the run began with, plain JSON; another's does not go on.
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
class Run:
    """What the steps of a run share; `frozen` is what `Job.load_frozen` gave, `consumed` counts
    rows that were drawn from the data, those of skipped steps too."""

    job: Job
    frozen: Any
    schedule: BatchSchedule
    batches: MeshBatches
    checkpoints: RunCheckpoints
    watcher: Watcher
    evaluation: Any  # a Mixture, or None
    consumed: int
    profiled: range
    restores: int = 0
    is_profiling: bool = False

    @property
    def config(self) -> ConfigDict:
        return self.job.config


def train(config: ConfigDict, workdir: Path, profiled: range = range(0)) -> list[dict[str, Any]]:
    """Trains a model from nothing; see `run_job`.

    Writes at the end the model folder `workdir/model`.

    Raises:
      ConfigError, TokenizerError, MeshError: what was asked for cannot be.
    """
    model = train_config.model_config(config)
    train_config.check(config)
    tokenizer = Tokenizer(config.data.tokenizer)
    check_vocabulary(model, tokenizer)
    model = model.replace(special_tokens=tokenizer.special_tokens)
    recipe, mesh = train_config.recipe(config), parse_mesh(config.mesh)
    job = Job(
        config, tokenizer, model, recipe, mesh,
        begin=lambda: init_state(model, recipe, jax.random.key(config.seed), mesh),
        finish=lambda state: save_trained(workdir, model, state, tokenizer),
        result=workdir / MODEL_FOLDER,
    )  # fmt: skip
    return run_job(job, workdir, profiled)


def run_job(job: Job, workdir: Path, profiled: range = range(0)) -> list[dict[str, Any]]:
    """Trains until all rows were seen, going on from the newest checkpoint in `workdir`.

    Writes `workdir/checkpoints`, `metrics.jsonl`, TensorBoard scalars in
    `workdir/tensorboard`, and at the end what the job makes of it.

    Args:
      profiled: steps of which `workdir/profile` gets a trace.

    Returns:
      The logged metrics of this call, one dictionary a logged step.

    Raises:
      ConfigError, DataError: what was asked for cannot be.
      SavingError, InterruptedRunError, DivergedError: the run stopped; what it saved stays.
    """
    config, model, recipe, mesh = job.config, job.model, job.recipe, job.mesh
    schedule = train_config.batch_schedule(config)
    mixture = open_mixture(config.data, config, job.tokenizer, schedule.micro_batch)
    evaluation = None
    if config.evaluation.every:
        evaluation = open_mixture(config.evaluation, config, job.tokenizer, schedule.micro_batch)
    batches = MeshBatches(mixture, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    with _closing(RunCheckpoints(workdir / "checkpoints", *_saving(config))) as checkpoints:
        place: dict[str, Any]
        restored = checkpoints.restore_latest(model, recipe, mesh)
        if restored is None:
            refuse_result_of_others(job.result)
        state, place = restored or (
            job.begin(),
            {"consumed": 0, "streams": batches.get_state(), "model": job.identity},
        )
        if place.get("model") != job.identity:
            raise ConfigError(
                f"{workdir} is a run of another model or precision: go on with the checkpoint "
                "that it began with, or name another workdir"
            )
        batches.set_state(place["streams"])
        peak = config.peak_flops or run_metrics.measured_peak_flops(model.compute_dtype)
        done, step = int(state.samples), int(state.step)
        peak *= mesh.size
        with _closing(Watcher(workdir, recipe.total_samples, done, step, peak)) as watcher:
            run = Run(
                job, job.load_frozen(), schedule, batches, checkpoints, watcher, evaluation,
                place["consumed"], profiled,
            )  # fmt: skip
            watcher.tell(describe(mixture, recipe.total_samples))
            if restored:
                watcher.tell(f"going on from step {step}, whose checkpoint is in {workdir}")
            with jax.set_mesh(mesh):
                state = _steps(run, state, workdir)
    job.finish(state)
    return watcher.history


@contextlib.contextmanager
def _closing(thing: Any) -> Iterator[Any]:
    """Closes what is given, but lets an error that is under way be the one that is seen."""
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


def _steps(run: Run, state: TrainState, workdir: Path) -> TrainState:
    key = jax.random.key(run.config.seed + 1)
    groups = len(run.batches.groups)
    job = run.job
    train_step = compiled_train_step(job.model, job.recipe, groups, job.mesh)
    drawn = _draw(run, run.consumed)
    with stop_requests() as stopped_by:
        while int(state.samples) < job.recipe.total_samples:
            batch, place = drawn
            with _profile(run, int(state.step) + 1, workdir):
                state, metrics = train_step(state, run.frozen, batch, key)
                # Made while the devices are at work.
                drawn = _draw(run, place["consumed"])
                values = run_metrics.plain(jax.device_get(metrics), run.batches.groups)
            rows = batch.tokens.shape[0] * batch.tokens.shape[1]
            run.watcher.count(0 if values["is_skipped"] else rows, batch.tokens.size)
            state = _after(run, state, values, place)
            if received := stopped_by(int(state.step)):
                _save(run, state, place)
                run.checkpoints.wait()
                processes.wait("all have saved")
                raise InterruptedRunError(
                    f"stopped by {received.name} after step {int(state.step)}, which is saved: "
                    "the same command goes on",
                    received,
                )
    return state


def _draw(run: Run, consumed: int) -> tuple[Batch, dict[str, Any]]:
    """The next batch, and the place in the data after it."""
    accumulation = run.schedule.accumulation(consumed)
    batch = run.batches.next(accumulation)
    rows = accumulation * run.schedule.micro_batch
    return batch, {"consumed": consumed + rows, "streams": run.batches.get_state()}


def _after(
    run: Run, state: TrainState, values: dict[str, Any], place: dict[str, Any]
) -> TrainState:
    """Logs, evaluates and saves what is due after a step, or goes back after bad ones."""
    step = int(state.step)
    is_last = int(state.samples) >= run.job.recipe.total_samples
    if values["is_skipped"]:
        run.watcher.log(step, values)
        run.watcher.tell(
            f"step {step + 1} skipped: gradient norm {values['gradient_norm']}, loss "
            f"{values['loss']} (None is not finite)"
        )
        return _restored(run, state, int(values["bad_steps"]))
    if step % run.config.log_every == 0 or is_last:
        flops = run_metrics.flops_per_token(
            run.job.model, run.config.data.sequence_length, run.frozen is not None
        )
        run.watcher.log(step, values, flops)
    elif values["is_spike"]:
        run.watcher.log(step, values)
    every = run.config.evaluation.every
    if every and (step % every == 0 or is_last):
        run.watcher.log(step, evaluate(run, state))
    if run.checkpoints.is_due(step) or is_last:
        _save(run, state, place)
        run.restores = 0
    return state


def _save(run: Run, state: TrainState, place: dict[str, Any]) -> None:
    streams = processes.gather(place["streams"])
    run.checkpoints.save(
        int(state.step), state, place | {"streams": streams, "model": run.job.identity}
    )


def _restored(run: Run, state: TrainState, bad_steps: int) -> TrainState:
    """The last good checkpoint's state after so many bad steps, whose data is passed over."""
    stability = run.config.stability
    if not stability.restore_after or bad_steps < stability.restore_after:
        return state
    restored = run.checkpoints.restore_latest(run.job.model, run.job.recipe, run.job.mesh)
    if restored is None or run.restores >= stability.most_restores:
        why = "before the first checkpoint" if restored is None else "after every restore"
        raise DivergedError(
            f"{bad_steps} steps in a row had to be skipped {why}: lower the learning rate, or "
            "look at the data of these steps"
        )
    run.restores += 1
    run.watcher.tell(
        f"{bad_steps} bad steps in a row: going back to the checkpoint of step "
        f"{int(restored[0].step)}, on with later data"
    )
    return restored[0]


def evaluate(run: Run, state: TrainState) -> dict[str, float]:
    """Mean loss of held-out samples by dataset and kind, the same samples every time."""
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
def _profile(run: Run, step: int, workdir: Path) -> Iterator[None]:
    """Traces from the first to the last of the profiled steps."""
    if run.profiled and step == run.profiled.start:
        jax.profiler.start_trace(str(workdir / "profile"))
        run.is_profiling = True
    yield
    if run.is_profiling and step >= run.profiled.stop - 1:
        jax.profiler.stop_trace()
        run.is_profiling = False


def check_vocabulary(model: GLMConfig, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where a tokenizer gives ids that a model does not have."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size}: --config.model.vocab_size=..."
        )
