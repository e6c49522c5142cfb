"""Checkpoints of a run: the train state and its position in the data, saved as one.

Every chunk of every array has a checksum, which TensorStore checks when it reads the chunk;
`checksums.json` lists the files.
"""

import contextlib
import errno
import functools
import gc
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import serialization
from jax.sharding import Mesh
from orbax.checkpoint._src.serialization import tensorstore_utils

from glm_jax import files, processes
from glm_jax.checkpoints.checksums import (
    DamageError,
    checked_files,
    unreadable,
    write_checksums,
)
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

_CLOCK_STEPS = 10  # steps between looks at the clock, which processes must agree on

_ITEMS = ("state", "data")
_DAMAGED_FOLDER = "damaged_checkpoints"  # beside the folder of the checkpoints


def _zarr_metadata(
    global_shape: tuple[int, ...], chunk_shape: tuple[int, ...], use_compression: bool
) -> dict[str, Any]:
    """Return the Zarr 3 metadata of an array whose chunks have checksums.

    Orbax has no option for codecs, and makes them in the threads of a save, in functions that
    a type handler cannot replace: so this is set for the whole process. Any reader of Zarr 3
    reads these arrays.
    """
    codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if use_compression:
        codecs.append({"name": "zstd", "configuration": {"level": 1}})
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
    return {
        "shape": global_shape,
        "chunk_grid": grid,
        "codecs": [*codecs, {"name": "crc32c"}],
    }


if not callable(tensorstore_utils._build_zarr3_metadata):
    raise ImportError("this version of Orbax makes the metadata of arrays elsewhere")
tensorstore_utils._build_zarr3_metadata = _zarr_metadata


class SavingError(UserError):
    """A checkpoint that could not be written; earlier ones stay."""


class RunCheckpoints:
    """The checkpoints of a run; one that is not complete is never restored."""

    def __init__(
        self,
        folder: Path,
        every: int,
        minutes: float,
        max_to_keep: int,
        keep_period: int,
        is_strict: bool = False,
    ):
        """Open the folder, which need not exist.

        Args:
          every: steps between checkpoints.
          minutes: save also when the last checkpoint is this old; 0 for steps alone.
          max_to_keep: number of newest checkpoints to keep.
          keep_period: checkpoints of multiples of this step stay for good; 0 for none.
          is_strict: raise an error for a damaged checkpoint instead of restoring an earlier one.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            keep_period=keep_period or None,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._complete),
        )
        self._folder, self._every, self._seconds = folder, every, 60 * minutes
        self._saved_at, self._is_strict = time.monotonic(), is_strict
        self._handlers: dict[str, Any] = {
            "state": ocp.PyTreeCheckpointHandler(use_zarr3=True),
            "data": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=self._handlers
        )

    def _complete(self) -> None:
        """List and sync the files of a checkpoint before it gets its final name."""
        if not processes.is_first():
            return
        for folder in self._folder.glob("*.orbax-checkpoint-tmp*"):
            written = [path for item in _ITEMS for path in (folder / item).rglob("*")]
            write_checksums(folder, written, {})
            files.sync(folder)

    def should_save(self, step: int) -> bool:
        """Return True if `save` is to be called after this step; the same in all processes."""
        if step % self._every == 0:
            return True
        if not self._seconds or step % _CLOCK_STEPS:
            return False
        return processes.agree(time.monotonic() - self._saved_at) >= self._seconds

    def save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Save; return when the arrays are copied, before they are on disk.

        Args:
          data_state: the position in the data, plain JSON.

        Raises:
          SavingError: the disk has no room for this checkpoint or for the one before.
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
                    state=ocp.args.PyTreeSave(serialization.to_state_dict(state)),
                    data=ocp.args.JsonSave(data_state),
                ),
                force=True,
            )
        self._saved_at = time.monotonic()

    def _check_room(self, state: TrainState) -> None:
        """Raise OSError before anything is written if the disk has no room for the state."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if missing := files.missing_room(self._folder, needed):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {missing}")

    def restore_latest(
        self, config: GLMConfig, recipe: Recipe, mesh: Mesh
    ) -> tuple[TrainState, Any] | None:
        """Restore the newest checkpoint that is not damaged.

        Damaged ones are named on stderr and moved to `damaged_checkpoints`.

        Returns:
          (state, data state), or None if there is no checkpoint.

        Raises:
          SavingError: a save in progress failed.
          DamageError: all checkpoints are damaged, or one is and `is_strict`.
          UserError: the checkpoint is of another model or recipe.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self._restore(step, config, recipe, mesh)
            except DamageError as error:
                if self._is_strict or step == steps[-1]:
                    raise
                if processes.is_first():
                    before = steps[steps.index(step) + 1]
                    print(f"{error}; resuming from step {before}", file=sys.stderr)
                processes.together(functools.partial(self._move_away, step))
                self._manager.reload()
            else:
                return restored
        return None

    def _restore(
        self, step: int, config: GLMConfig, recipe: Recipe, mesh: Mesh
    ) -> tuple[TrainState, Any]:
        target = abstract_saved_state(config, recipe, mesh)
        folder = self._folder / str(step)
        saved, data = processes.together(
            lambda: self._read(folder, serialization.to_state_dict(target)), DamageError
        )
        state: TrainState = serialization.from_state_dict(target, saved)
        # In new buffers: jax must own what is donated to a step.
        return step_form(state, abstract_state(config, recipe, mesh)), data

    def _read(self, folder: Path, expected: dict[str, Any]) -> tuple[Any, Any]:
        """Read this process's part of a checkpoint.

        With the handlers: the manager would wait for the other processes, which may have found
        damage.
        """
        if processes.is_first():
            checked_files(folder)
        state, data = (folder.absolute() / item for item in _ITEMS)
        restore_args = ocp.checkpoint_utils.construct_restore_args(expected)
        try:
            _refuse_other(folder, self._handlers["state"].metadata(state), expected)
            return (
                self._handlers["state"].restore(
                    state, args=ocp.args.PyTreeRestore(expected, restore_args=restore_args)
                ),
                self._handlers["data"].restore(data, args=ocp.args.JsonRestore()),
            )
        except UserError:
            raise
        except Exception as error:  # libraries raise many kinds for damage
            failure = unreadable(folder, _first_cause(error))
        _forget_broken_reads()
        raise failure

    def _move_away(self, step: int) -> None:
        """Move a damaged checkpoint to another folder; its step will be saved again."""
        if not processes.is_first():
            return
        target = self._folder.parent / _DAMAGED_FOLDER / str(step)
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        (self._folder / str(step)).rename(target)

    def wait(self) -> None:
        """Return when all saves are on disk.

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
            this = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            raise SavingError(
                f"no room for {this} in {self._folder}: {last}; make room and start the same "
                f"command again ({str(error)[:200]})"
            ) from error


def _refuse_other(folder: Path, metadata: Any, expected: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint's arrays are not those of the run's state."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}

    saved, wanted = shapes(getattr(metadata, "tree", metadata)), shapes(expected)
    if saved != wanted:
        name = next(n for n in saved | wanted if saved.get(n) != wanted.get(n))
        raise UserError(
            f"{folder} is a checkpoint of another model or recipe: use the config that it began "
            f"with, or name another workdir ({name} is {saved.get(name)}, expected "
            f"{wanted.get(name)})"
        )


def _first_cause(error: BaseException) -> Any:
    """Return the error at the start of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _forget_broken_reads() -> None:
    """Collect Orbax's other reads without the tracebacks that they would print."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook
