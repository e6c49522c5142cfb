"""Checkpoints of a run: the train state and where its data stands, saved as one."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax import serialization

from glm_jax.training.state import TrainState


class RunCheckpoints:
    """The checkpoints under a run's folder; a half-written one never counts."""

    def __init__(self, folder: Path, every: int, kept: int):
        """Args:
        every: steps between checkpoints.
        kept: how many of the newest stay.
        """
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=every, max_to_keep=kept, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def is_due(self, step: int) -> bool:
        """Whether `save` should be called after this step."""
        return self._manager.should_save(step)

    def save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Saves; returns when the arrays are copied, before they are on disk."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(serialization.to_state_dict(state)),
                data=ocp.args.JsonSave(data_state),
            ),
            force=True,
        )

    def restore_latest(self, target: TrainState) -> tuple[TrainState, Any] | None:
        """The newest whole checkpoint as (state, data state), None if there is none yet.

        Args:
          target: abstract state that gives shapes, dtypes and shardings.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(serialization.to_state_dict(target)),
                data=ocp.args.JsonRestore(),
            ),
        )
        state: TrainState = serialization.from_state_dict(target, restored["state"])
        return state, restored["data"]

    def close(self) -> None:
        """Waits for saves that are under way."""
        self._manager.wait_until_finished()
        self._manager.close()
