"""The text of `--help`: a command's own flags, and the fields of its experiment."""

import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from glm_jax.cli.experiments import ExperimentParser, fields, load_experiment

_ASKING = ("-h", "-?", "--help", "-help", "--helpshort", "-helpshort")
_PACKAGES = ("convert", "glm_jax", "launch")
_REQUIRED = "must have a value other than None"
_REPEATED = ";\n    repeat this option to specify a list of values"  # absl's
_MAX_WIDTH = 100


def asked_for(arguments: Sequence[str]) -> str | None:
    """Return the help that a command line asks for; None if it asks for none.

    Raises:
      flags.Error: its experiment cannot be loaded.
    """
    ours = list(arguments)
    ours = ours[: ours.index("--")] if "--" in ours else ours
    if any(argument in _ASKING for argument in ours):
        return _text(ours)
    if any(argument.lstrip("-") == "helpfull" for argument in ours):
        return f"{_documentation()}\n{flags.FLAGS.get_help()}\n"
    return None


def own_flags() -> list[flags.Flag]:
    """Return the flags that the program and the project's modules define, in that order.

    Neither other libraries' flags nor the fields of an experiment are among them.
    """
    by_module = flags.FLAGS.flags_by_module_dict()
    return [
        flag
        for module, of_module in by_module.items()
        if module == sys.argv[0] or module.split(".")[0] in _PACKAGES
        for flag in of_module
        if not flag.name.startswith("config.")
    ]


def is_required(flag: flags.Flag) -> bool:
    """Return whether a command line without the flag is refused."""
    return any(_REQUIRED in validator.message for validator in flag.validators)


def _documentation() -> str:
    return inspect.cleandoc(sys.modules["__main__"].__doc__ or "")


def _text(arguments: Sequence[str]) -> str:
    """Return the running program's help, with the fields of its `--config`."""
    known = sorted(own_flags(), key=lambda flag: not is_required(flag))
    lines = [_documentation(), "", "Flags:", *(line for flag in known for line in _entry(flag))]
    for flag in known:
        if isinstance(flag.parser, ExperimentParser):
            file = _experiment_of(arguments) or flag.parser.example
            lines += ["", f"Fields of the experiment, with the values of {file}:"]
            lines += _fields_of(file)
    return "\n".join(lines) + "\n"


def _experiment_of(arguments: Sequence[str]) -> str | None:
    """Return the experiment that the arguments name."""
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else "".join(arguments[number + 1 : number + 2]) or None
    return None


def _entry(flag: flags.Flag) -> Iterator[str]:
    """Yield a flag's lines: its name and kind of value, then its help."""
    kinds = {"bool": "", "string": "=TEXT", "int": "=INTEGER", "float": "=NUMBER"}
    choices = getattr(flag.parser, "enum_values", None)
    described = flag.help.removesuffix(_REPEATED)
    if choices:
        described = described.removeprefix(f"<{'|'.join(choices)}>: ")
        kind = "=" + "|".join(choices)
    elif flag.flag_type().startswith("multi string"):
        kind = "=TEXT"
    elif isinstance(flag.parser, ExperimentParser):
        kind = "=FILE"
    else:
        kind = kinds.get(flag.flag_type(), "=A,B,..")
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    notes = ["required"] if is_required(flag) else []
    if isinstance(flag.parser, ExperimentParser) and flag.parser.is_default:
        notes.append(f"default: {flag.parser.example}")
    elif flag.default is not None and flag.default is not False and flag.default != []:
        notes.append(f"default: {(flag.default_as_str or '').strip(chr(39)) or 'empty'}")
    bounds = getattr(flag.parser, "lower_bound", None), getattr(flag.parser, "upper_bound", None)
    if bounds != (None, None) and " to " not in described:
        notes.append(flag.parser.syntactic_help)
    yield from _wrapped(f"{name}{kind}", described, notes)


def _fields_of(file: str) -> Iterator[str]:
    # Imported late: commands without training do not need it.
    from glm_jax.training.field_help import field_help

    for name, value in fields(load_experiment(file)).items():
        shown = repr(value) if value == "" else value
        yield from _wrapped(f"--config.{name}", field_help(name), [f"default: {shown}"])


def _wrapped(head: str, described: str, notes: Sequence[Any]) -> Iterator[str]:
    width = min(_MAX_WIDTH, shutil.get_terminal_size((_MAX_WIDTH, 24)).columns)
    yield f"  {head}"
    note = f" ({'; '.join(notes)})" if notes else ""
    body = f"{described.strip().rstrip('.')}{note}"
    yield from textwrap.wrap(
        body,
        width,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )
