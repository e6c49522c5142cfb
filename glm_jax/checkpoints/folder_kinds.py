"""What a path is that should be a model folder and is none, and what to give instead.

Files are known by their names alone: nothing is opened, and no path is followed outside.
"""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

CONFIG_FILE = "config.json"
_SHARDS = re.compile(r"latest|mp_rank_\d+\S*\.pt|.*\.tar|.*\.part[_.]?\w+")
_PYTORCH = re.compile(r".*\.(pt|pth|bin|ckpt)")
_TEXTS = re.compile(r".*\.(txt|jsonl|json|csv|tsv|parquet)(\.gz|\.zst)?")
_OF_A_RUN = {"checkpoints", "tensorboard", "metrics.jsonl"}
_MAX_NAMES = 1000  # of a folder that are looked at
_CONVERT = "python -m convert.sat_to_orbax --input={} --output=DIR"


def described(path: str | os.PathLike[str], has_other_config: bool = False) -> str:
    """Return what lies at a path that is no model folder, and what to give: words for the end of an
    error's line.

    Args:
      has_other_config: its config.json is another program's.
    """
    place = Path(path)
    try:
        if not place.exists():
            return _missing(place)
        return _folder(place, has_other_config) if place.is_dir() else _file(place)
    except OSError as error:
        return f"it cannot be read ({error.strerror}): give a folder that can"


def _missing(place: Path) -> str:
    if place.with_name(f"{place.name}.partial").is_dir():
        return (
            f"{place}.partial is unfinished: give the command that writes it again, which goes on "
            "where it stopped"
        )
    parent = place.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(place.name, names, 1, 0.7)
    near = f": did you mean {parent / close[0]}?" if close else ""
    return f"there is no such folder{near}"


def _file(place: Path) -> str:
    if (place.parent / CONFIG_FILE).is_file():
        return f"it is a file of a model folder: give {place.parent}"
    if place.suffix == ".model":
        return "it is a tokenizer's file: give it by --tokenizer, and a model folder here"
    if _SHARDS.fullmatch(place.name) or _PYTORCH.fullmatch(place.name):
        is_archive = not _PYTORCH.fullmatch(place.name) and place.name != "latest"
        whole = place if is_archive else place.parent
        return f"it is a file of PyTorch weights: convert them first, {_CONVERT.format(whole)}"
    if place.suffix == ".safetensors":
        return "it is one file of safetensors, which are no model folder: convert the original"
    return "it is a file: give a model folder"


def _folder(place: Path, has_other_config: bool) -> str:
    names = {entry.name for entry, _ in zip(os.scandir(place), range(_MAX_NAMES), strict=False)}
    names -= {CONFIG_FILE} if has_other_config else set()
    for kind in _KINDS:
        said = kind(place, names)
        if said is not None:
            return said
    models = sorted(name for name in names if is_model(place / name))
    if models:
        return f"it is a folder of models: give {' or '.join(str(place / m) for m in models[:3])}"
    if is_model(place / "run" / "model"):
        return f"it is a folder with a training run: give {place / 'run' / 'model'}"
    some = ", ".join(sorted(names)[:3])
    return f"it holds {some}{', ..' if len(names) > 3 else ''}: give a model folder"


def is_model(place: Path) -> bool:
    """Return True of a folder with a model's config and parameters, whatever their state."""
    return (place / CONFIG_FILE).is_file() and (place / "params").is_dir()


def _unfinished(place: Path, names: set[str]) -> str | None:
    if not place.name.endswith(".partial"):
        return None
    return "it is unfinished: give the command that writes it again, which goes on"


def _adapters(place: Path, names: set[str]) -> str | None:
    if "adapter.json" not in names:
        return None
    return (
        f"it is a folder of adapters: give it by --adapter={place}, and by --checkpoint the model "
        "that they were trained on"
    )


def _part(place: Path, names: set[str]) -> str | None:
    for whole in place.absolute().parents[:3]:
        if is_model(whole):
            return f"it is a part of a model folder: give {_as_given(place, whole)}"
        if {p.name for p in whole.iterdir()} >= _OF_A_RUN:
            return f"it is a part of a training run: {_of_run(_as_given(place, whole))}"
    return None


def _as_given(place: Path, whole: Path) -> Path:
    return whole if place.is_absolute() else Path(os.path.relpath(whole))


def _run(place: Path, names: set[str]) -> str | None:
    if not names & _OF_A_RUN:
        return None
    return f"it is the workdir of a training run: {_of_run(place)}"


def _of_run(workdir: Path) -> str:
    if is_model(workdir / "model"):
        return f"give {workdir / 'model'}"
    if (workdir / "adapter").is_dir():
        return (
            f"give --adapter={workdir / 'adapter'}, and by --checkpoint the model that the run "
            "began with"
        )
    return (
        "it has not ended: give its command again, which goes on; at its end the model is in "
        f"{workdir / 'model'}"
    )


def _safetensors(place: Path, names: set[str]) -> str | None:
    if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return None
    if CONFIG_FILE not in names:
        return "it is a folder of safetensors of another program: convert the released weights"
    return (
        "it is a folder of safetensors: write shards of it, python -m convert.orbax_to_sat "
        f"--input={place} --output=SHARDS, and convert these, {_CONVERT.format('SHARDS')}"
    )


def _shards(place: Path, names: set[str]) -> str | None:
    if any(map(_SHARDS.fullmatch, names)):
        return f"it is a folder of PyTorch shards: convert them, {_CONVERT.format(place)}"
    inner = [name for name in names if re.fullmatch(r"\d+|iter_\d+", name)]
    for name in inner:
        if any(_SHARDS.fullmatch(file.name) for file in (place / name).glob("*")):
            return f"it is a folder of PyTorch shards: convert them, {_CONVERT.format(place)}"
    if any(map(_PYTORCH.fullmatch, names)):
        return (
            "it holds PyTorch weights of another layout than the released one: convert.inspect "
            f"{place} says more"
        )
    return None


def _others(place: Path, names: set[str]) -> str | None:
    if "dataset.json" in names:
        return f"it is a prepared data set: give it by --config.data.mixture={place}:1"
    if "tokenizer.model" in names and CONFIG_FILE not in names:
        return f"it is a tokenizer: give it by --tokenizer={place}, and a model folder here"
    if "job.json" in names:
        return "it is the output of launch.decode: give the model folder that answered"
    if {"records", "results.json"} & names:
        return "it is the output of launch.evaluate: give the model folder that it evaluated"
    if names and all(map(_TEXTS.fullmatch, names - {CONFIG_FILE})) and CONFIG_FILE not in names:
        return f"it is a folder of data ({min(names)}): give a model folder"
    return None


def _empty(place: Path, names: set[str]) -> str | None:
    if names:
        return None
    return "it is empty: give a folder that a converter or a training run has written"


_KINDS: tuple[Callable[[Path, set[str]], str | None], ...] = (
    _unfinished,
    _adapters,
    _safetensors,
    _shards,
    _run,
    _part,
    _empty,
    _others,
)
