"""The flag `--config`: an experiment's Python file, each of whose fields is a flag too."""

import difflib
import re
import runpy
import sys
from pathlib import Path
from typing import Any

from absl import flags

from glm_jax.cli.packaged import packaged
from glm_jax.errors import UserError

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


class ExperimentParser(flags.ArgumentParser):
    """Loads an experiment's file, and refuses in words what is no such file and no such field.

    Attributes:
      example: a file to show where none is given.
      is_default: the example is taken where none is given.
    """

    def __init__(self, example: str, is_default: bool):
        self.example, self.is_default = example, is_default

    def parse(self, path: str) -> Any:
        config = load_experiment(path)
        for argument in sys.argv[1:]:
            given = _OVERRIDE.match(argument)
            if given is not None:
                _check_field(path, config, given[1])
        return config

    def flag_type(self) -> str:
        return "experiment"


def define_experiment_flag(example: str, is_default: bool = False) -> None:
    """Defines `--config`, and `--config.FIELD` of each field of the file that it names.

    Args:
      example: a file of configs/.
      is_default: it is taken where none is given; else the flag is required.
    """
    text = f"an experiment, a file of configs/ or of your own, such as {example}"
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, text)
    flags.FLAGS["config"].parser = ExperimentParser(example, is_default)
    if not is_default:
        flags.mark_flag_as_required("config")


def with_default_experiment(arguments: list[str]) -> list[str]:
    """A command line with the program first, to which `--config` is added where there is a
    default and the command line has none. Absl would load it before it knows the fields."""
    parser = flags.FLAGS["config"].parser if "config" in flags.FLAGS else None
    if not isinstance(parser, ExperimentParser) or not parser.is_default:
        return arguments
    if any(re.match(r"--?config(=|$)", argument) for argument in arguments):
        return arguments
    return [arguments[0], f"--config={parser.example}", *arguments[1:]]


def load_experiment(path: str) -> Any:
    """What `get_config()` of an experiment's file returns, locked: it takes no new fields.

    Args:
      path: of the file; one of `configs/` may be the installed package's. What follows a colon is
        handed to `get_config`.

    Raises:
      flags.IllegalFlagValueError: there is no such file, or it gives no experiment.
    """
    file, *options = packaged(path).split(":", 1)
    if not Path(file).is_file():
        raise flags.IllegalFlagValueError(
            f"--config={path}: there is no such file: give an experiment, such as "
            "configs/train_tiny.py"
        )
    try:
        config = runpy.run_path(file)["get_config"](*options)
    except Exception as error:  # whatever the file's code does
        said = str(error).strip().splitlines()[-1:] or [""]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise flags.IllegalFlagValueError(
            f"--config={path} is no experiment: {kind}{said[0]}"
        ) from error
    if not _is_config(config) or "model" not in config:
        raise flags.IllegalFlagValueError(
            f"--config={path}: its get_config() returns no experiment: begin with that of "
            "configs/train_tiny.py"
        )
    return config.lock()


def fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"data.batch_size": value} of every field of an experiment."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        is_inner = _is_config(value)
        found |= fields(value, f"{prefix}{name}.") if is_inner else {prefix + name: value}
    return found


def _is_config(value: Any) -> bool:
    # Imported late: images for GPUs may lack it, and every command comes by this module.
    from ml_collections import ConfigDict

    return isinstance(value, ConfigDict)


def _check_field(path: str, config: Any, name: str) -> None:
    inner: Any = config
    for part in name.split("."):
        if not _is_config(inner) or part not in inner:
            close = difflib.get_close_matches(name, fields(config), 3, 0.5)
            ours = [field for field in fields(config) if field.endswith(f".{name}")]
            near = " or ".join(f"--config.{field}" for field in (ours or close[:1]))
            hint = f"did you mean {near}? " if near else ""
            raise flags.IllegalFlagValueError(
                f"--config.{name}: {path} has no field {name!r}; {hint}--help lists all"
            )
        inner = inner[part]
