"""What a run leaves at its end, always of its last step."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm_jax import files, processes
from glm_jax.checkpoints.model_folder import save_model
from glm_jax.config import GLMConfig
from glm_jax.errors import UserError
from glm_jax.tokenizer import Tokenizer
from glm_jax.training.state import TrainState

MODEL_FOLDER = "model"


def save_trained(workdir: Path, model: GLMConfig, state: TrainState, tokenizer: Tokenizer) -> None:
    """Writes a whole model that was trained, in place of that of an earlier, shorter run."""

    def write(folder: Path) -> None:
        params: Any = state.params
        save_model(folder, model, params, tokenizer.files)

    replace_result(workdir / MODEL_FOLDER, int(state.step), write)


def refuse_result_of_others(folder: Path) -> None:
    """Raises UserError where the result of a run that begins would replace what no run wrote."""
    if folder.exists() and not _about(folder).is_file():
        raise UserError(
            f"{folder} is no earlier run's, and what this one learns would replace it: name "
            "another workdir"
        )


def _about(folder: Path) -> Path:
    """The file that says of which step a result is."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.json")


def replace_result(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Writes what a run leaves after `step`, unless this step's is there; joined processes all
    call it.

    What is there stays until the new one is whole. FOLDER.json says which step's is there, and
    is missing while they change places: a run that is killed then writes its result again.

    Args:
      write: writes it to a folder that does not exist.
    """
    folder = folder.resolve()
    about, new, old = (
        _about(folder),
        *(folder.with_name(folder.name + end) for end in (".new", ".old")),
    )
    content = json.dumps({"step": step}) + "\n"
    is_there = folder.exists() and about.is_file() and about.read_text("utf-8") == content
    if processes.agree(float(is_there)):
        return
    if processes.is_first():
        about.unlink(missing_ok=True)
        shutil.rmtree(new, ignore_errors=True)
    processes.wait(f"a place for {new.name}")
    write(new)
    if processes.is_first():
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        files.put_in_place(new, folder)
        files.write_text(about, content)
        shutil.rmtree(old, ignore_errors=True)
    processes.wait(f"{folder.name} is in its place")
