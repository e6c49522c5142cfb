"""The flag `--config`: an experiment's Python file, whose fields are flags, too."""

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
    """Loads an experiment's file; errors name the file or the unknown field.

    Attributes:
      example: a file for help and errors.
      is_default: use the example if the flag is missing.
    """

    def __init__(self, example: str, is_default: bool):
        self.example, self.is_default = example, is_default

    def parse(self, path: str) -> Any:
        config = load_experiment(path)
        for argument in sys.argv[1:]:
            override = _OVERRIDE.match(argument)
            if override is not None:
                _check_field(path, config, override[1])
        return config

    def flag_type(self) -> str:
        return "experiment"


def define_experiment_flag(example: str, is_default: bool = False) -> None:
    """Define `--config`, and `--config.FIELD` for each field of the file that it names.

    Args:
      example: a file of configs/.
      is_default: use the example if the flag is missing; else the flag is required.
    """
    text = f"an experiment, a file of configs/ or of your own, such as {example}"
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, text)
    flags.FLAGS["config"].parser = ExperimentParser(example, is_default)
    if not is_default:
        flags.mark_flag_as_required("config")


def with_default_experiment(arguments: list[str]) -> list[str]:
    """Add a default `--config` to a command line that has none.

    An absl default would be loaded before absl knows the fields.
    """
    parser = flags.FLAGS["config"].parser if "config" in flags.FLAGS else None
    if not isinstance(parser, ExperimentParser) or not parser.is_default:
        return arguments
    if any(re.match(r"--?config(=|$)", argument) for argument in arguments):
        return arguments
    return [arguments[0], f"--config={parser.example}", *arguments[1:]]


def load_experiment(path: str) -> Any:
    """Return the locked result of `get_config()` of an experiment's file.

    Args:
      path: of the file, see `packaged`; text after a colon is `get_config`'s argument.

    Raises:
      flags.IllegalFlagValueError: there is no such file, or it returns no experiment.
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
    """Return {"data.batch_size": value} of every field of an experiment."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        is_inner = _is_config(value)
        values |= fields(value, f"{prefix}{name}.") if is_inner else {prefix + name: value}
    return values


def _is_config(value: Any) -> bool:
    # Imported late: images for GPUs may lack it, and every command imports this module.
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
