"""The result of a run, always of its last step: it replaces that of a shorter run as a whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm_jax import files, processes
from glm_jax.checkpoints.model_folder import check_model, save_model
from glm_jax.config import GLMConfig
from glm_jax.errors import UserError
from glm_jax.tokenizer import Tokenizer
from glm_jax.training.state import TrainState

MODEL_FOLDER = "model"


def save_trained(workdir: Path, model: GLMConfig, state: TrainState, tokenizer: Tokenizer) -> None:
    """Write the trained model to `workdir/model`, replacing that of a shorter run."""

    def write(folder: Path) -> None:
        params: Any = state.params
        save_model(folder, model, params, tokenizer.files)

    replace_result(workdir / MODEL_FOLDER, int(state.step), write, check_model)


def refuse_result_of_others(folder: Path) -> None:
    """Raise UserError if the result of a new run would replace a folder that no run wrote."""
    if folder.exists() and not _about(folder).is_file():
        raise UserError(
            f"{folder} is no earlier run's, and the result of this run would replace it: name "
            "another workdir"
        )


def _about(folder: Path) -> Path:
    """Return the file that names the step of a result."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.json")


def replace_result(
    folder: Path, step: int, write: Callable[[Path], None], check: Callable[[Path], None]
) -> None:
    """Write the result of a run after `step`, unless it is there, which is checked; all joined
    processes call it.

    An earlier result stays until the new one is complete. FOLDER.json names the step of the
    result, and is missing while the folders are renamed: a run that is killed then writes its
    result again.

    Args:
      folder: of the result.
      write: writes the result to a folder that does not exist.
      check: raises UserError where the folder is not what was written.

    Raises:
      UserError: the result of this step is there, and damaged.
    """
    folder = folder.resolve()
    about, new, old = (
        _about(folder),
        *(folder.with_name(folder.name + end) for end in (".new", ".old")),
    )
    content = json.dumps({"step": step}) + "\n"
    is_there = folder.exists() and about.is_file() and about.read_text("utf-8") == content
    if processes.agree(float(is_there)):
        try:
            processes.together(lambda: check(folder) if processes.is_first() else None)
        except UserError as error:
            raise UserError(
                f"{error}: remove {folder}, and the same command writes it again"
            ) from error
        return
    if processes.is_first():
        about.unlink(missing_ok=True)
        shutil.rmtree(new, ignore_errors=True)
    processes.wait(f"room for {new.name}")
    write(new)
    if processes.is_first():
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        files.put_in_place(new, folder)
        files.write_text(about, content)
        shutil.rmtree(old, ignore_errors=True)
    processes.wait(f"{folder.name} is renamed")
