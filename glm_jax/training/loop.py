"""A whole run: data, steps, metrics, checkpoints and the finished model."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from glm_jax import processes
from glm_jax.config import ConfigError, GLMConfig
from glm_jax.errors import UserError
from glm_jax.model.checkpoint import save_model
from glm_jax.model.params import stack_layers
from glm_jax.sharding import parse_mesh
from glm_jax.tokenizer import Tokenizer
from glm_jax.training import config as train_config
from glm_jax.training import watching
from glm_jax.training.checkpoints import RunCheckpoints
from glm_jax.training.feeding import MeshBatches, open_mixture
from glm_jax.training.recipe import BatchSchedule, Recipe
from glm_jax.training.state import Batch, TrainState, init_state
from glm_jax.training.step import compiled_train_step, evaluation_step
from glm_jax.training.watching import Watcher

MODEL_FOLDER = "model"


class InterruptedRunError(UserError):
    """A run that was asked to stop (SIGTERM) and saved what it had."""


class DivergedError(UserError):
    """Steps that stay bad whatever data is passed over."""


@dataclasses.dataclass
class Run:
    """What the steps of a run share; `consumed` counts rows that were drawn from the data,
    those of skipped steps too."""

    config: ConfigDict
    model: GLMConfig
    recipe: Recipe
    schedule: BatchSchedule
    mesh: Mesh
    batches: MeshBatches
    checkpoints: RunCheckpoints
    watcher: Watcher
    evaluation: Any  # a Mixture, or None
    consumed: int
    profiled: range
    restores: int = 0
    is_profiling: bool = False


def train(config: ConfigDict, workdir: Path, profiled: range = range(0)) -> list[dict[str, Any]]:
    """Trains until all rows were seen, going on from the newest checkpoint in `workdir`.

    Writes `workdir/checkpoints`, `metrics.jsonl`, TensorBoard scalars in
    `workdir/tensorboard`, and at the end the model folder `workdir/model`.

    Args:
      profiled: steps of which `workdir/profile` gets a trace.

    Returns:
      The logged metrics of this call, one dictionary a logged step.

    Raises:
      ConfigError, DataError, TokenizerError, MeshError: what was asked for cannot be.
      SavingError, InterruptedRunError, DivergedError: the run stopped; what it saved stays.
    """
    train_config.check(config)
    tokenizer = Tokenizer(config.data.tokenizer)
    model = _model_for(config, tokenizer)
    recipe, schedule = train_config.recipe(config), train_config.batch_schedule(config)
    mesh = parse_mesh(config.mesh)
    mixture = open_mixture(config.data, config, tokenizer, schedule.micro_batch)
    evaluation = None
    if config.evaluation.every:
        evaluation = open_mixture(config.evaluation, config, tokenizer, schedule.micro_batch)
    batches = MeshBatches(mixture, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    with _closing(RunCheckpoints(workdir / "checkpoints", *_saving(config))) as checkpoints:
        data_state: Any
        state, data_state = checkpoints.restore_latest(model, recipe, mesh) or (
            init_state(model, recipe, jax.random.key(config.seed), mesh),
            {"consumed": 0, "streams": batches.get_state()},
        )
        batches.set_state(data_state["streams"])
        peak = config.peak_flops or watching.measured_peak_flops(model.compute_dtype)
        done, step = int(state.samples), int(state.step)
        peak *= mesh.size
        with _closing(Watcher(workdir, recipe.total_samples, done, step, peak)) as watcher:
            run = Run(
                config, model, recipe, schedule, mesh, batches, checkpoints, watcher,
                evaluation, data_state["consumed"], profiled,
            )  # fmt: skip
            with jax.set_mesh(mesh):
                state = _steps(run, state, workdir)
    if not (workdir / MODEL_FOLDER).exists():
        params = stack_layers(state.params)
        save_model(workdir / MODEL_FOLDER, model, params, tokenizer.files)
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


def _saving(config: ConfigDict) -> tuple[int, float, int, int]:
    return (
        config.checkpoint_every,
        config.checkpoint_minutes,
        config.checkpoints_kept,
        config.checkpoints_kept_every,
    )


def _steps(run: Run, state: TrainState, workdir: Path) -> TrainState:
    key = jax.random.key(run.config.seed + 1)
    groups = len(run.batches.groups)
    train_step = compiled_train_step(run.model, run.recipe, groups, run.mesh)
    drawn = _draw(run, run.consumed)
    with _termination() as must_stop:
        while int(state.samples) < run.recipe.total_samples:
            batch, place = drawn
            with _profile(run, int(state.step) + 1, workdir):
                state, metrics = train_step(state, batch, key)
                # Made while the devices are at work.
                drawn = _draw(run, place["consumed"])
                values = watching.plain(jax.device_get(metrics), run.batches.groups)
            rows = batch.tokens.shape[0] * batch.tokens.shape[1]
            run.watcher.count(0 if values["is_skipped"] else rows, batch.tokens.size)
            state = _after(run, state, values, place)
            if must_stop(int(state.step)):
                _save(run, state, place)
                run.checkpoints.wait()
                raise InterruptedRunError(
                    f"stopped by SIGTERM after step {int(state.step)}, which is saved: the same "
                    "command goes on"
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
    is_last = int(state.samples) >= run.recipe.total_samples
    if values["is_skipped"]:
        run.watcher.log(step, values)
        run.watcher.tell(
            f"step {step + 1} skipped: gradient norm {values['gradient_norm']}, loss "
            f"{values['loss']} (None is not finite)"
        )
        return _restored(run, state, int(values["bad_steps"]))
    if step % run.config.log_every == 0 or is_last:
        flops = watching.flops_per_token(run.model, run.config.data.sequence_length)
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
    run.checkpoints.save(int(state.step), state, place | {"streams": streams})


def _restored(run: Run, state: TrainState, bad_steps: int) -> TrainState:
    """The last good checkpoint's state after so many bad steps, whose data is passed over."""
    stability = run.config.stability
    if not stability.restore_after or bad_steps < stability.restore_after:
        return state
    restored = run.checkpoints.restore_latest(run.model, run.recipe, run.mesh)
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
    batches = MeshBatches(run.evaluation, run.mesh)
    groups = len(batches.groups)
    losses, counts = np.zeros(groups), np.zeros(groups)
    for _ in range(run.config.evaluation.batches):
        sums = evaluation_step(state.params, batches.next(1), run.model, run.recipe, groups)
        losses += np.asarray(sums["group_losses"])
        counts += np.asarray(sums["group_counts"])
    total = {"evaluation_loss": float(losses.sum() / max(counts.sum(), 1.0))}
    return total | watching.mean_by_group("evaluation_loss", losses, counts, batches.groups)


@contextlib.contextmanager
def _termination() -> Iterator[Callable[[int], bool]]:
    """Gives a function of the step: whether SIGTERM has come, to any of the processes."""
    if jax.process_count() > 1:
        # jax has a handler of its own there, and brings the processes to one step.
        yield lambda step: bool(multihost_utils.reached_preemption_sync_point(step))
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


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


def _model_for(config: ConfigDict, tokenizer: Tokenizer) -> GLMConfig:
    model = train_config.model_config(config)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size}: --config.model.vocab_size=..."
        )
    return model.replace(special_tokens=tokenizer.special_tokens)
