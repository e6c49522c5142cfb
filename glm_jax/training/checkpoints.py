"""Checkpoints of a run: the train state and where its data stands, saved as one."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import serialization
from jax.sharding import Mesh

from glm_jax import processes
from glm_jax.config import GLMConfig
from glm_jax.errors import UserError, is_no_room
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import (
    TrainState,
    abstract_saved_state,
    abstract_state,
    saved_form,
    step_form,
)

_MINUTES_CHECKED = 10  # steps between looks at the clock, which processes must agree on


class SavingError(UserError):
    """A checkpoint that could not be written; those before it stay."""


class RunCheckpoints:
    """The checkpoints under a run's folder; a half-written one never counts."""

    def __init__(self, folder: Path, every: int, minutes: float, kept: int, kept_every: int):
        """Args:
        every: steps between checkpoints.
        minutes: time after which one is due besides; 0 for steps alone.
        kept: how many of the newest stay.
        kept_every: those of steps that this divides stay for good; 0 for none.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=kept,
            keep_period=kept_every or None,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._folder, self._every, self._seconds = folder, every, 60 * minutes
        self._saved_at = time.monotonic()
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def is_due(self, step: int) -> bool:
        """Whether `save` should be called after this step; the same in all processes."""
        if step % self._every == 0:
            return True
        if not self._seconds or step % _MINUTES_CHECKED:
            return False
        return processes.agree(time.monotonic() - self._saved_at) >= self._seconds

    def save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Saves; returns when the arrays are copied, before they are on disk.

        Raises:
          SavingError: there is no room for this one or for the one before.
        """
        if step in self._manager.all_steps():
            return
        state = saved_form(state)
        with self._explained(step):
            self.wait()
            self._check_room(state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(serialization.to_state_dict(state)),
                    data=ocp.args.JsonSave(data_state),
                ),
                force=True,
            )
        self._saved_at = time.monotonic()

    def _check_room(self, state: TrainState) -> None:
        """Says no before anything is written, where that is bound to fail half-way."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: {free >> 20} MiB free of {needed >> 20} MiB",
            )

    def restore_latest(
        self, config: GLMConfig, recipe: Recipe, mesh: Mesh
    ) -> tuple[TrainState, Any] | None:
        """The newest whole checkpoint as (state, data state), None if there is none yet.

        Raises:
          SavingError: a save that is under way failed.
          UserError: the checkpoint is of another model or recipe.
        """
        self.wait()
        step = self._manager.latest_step()
        if step is None:
            return None
        target = abstract_saved_state(config, recipe, mesh)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(serialization.to_state_dict(target)),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{self._folder / str(step)} is a checkpoint of another model or recipe: go on "
                f"with its config, or name another workdir ({str(error)[:300]})"
            ) from error
        state: TrainState = serialization.from_state_dict(target, restored["state"])
        # Its buffers are new: what is donated to a step must belong to jax alone.
        return step_form(state, abstract_state(config, recipe, mesh)), restored["data"]

    def wait(self) -> None:
        """Returns when saves under way are on disk.

        Raises:
          SavingError: one could not be written.
        """
        with self._explained(None):
            self._manager.wait_until_finished()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except SavingError:
            raise
        except Exception as error:
            if not is_no_room(error):
                raise
            whole = self._manager.all_steps()
            last = f"the last whole checkpoint is step {max(whole)}" if whole else "there is none"
            which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            raise SavingError(
                f"no room for {which} in {self._folder}: {last}; make room and start the same "
                f"command again ({str(error)[:200]})"
            ) from error
