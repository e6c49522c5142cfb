"""The command `glm-jax`: every job of the project by its name.

    glm-jax COMMAND --help
    glm-jax --version

`python -m launch COMMAND` is the same, and so is `python -m MODULE` with the command's module.
"""

import ast
import difflib
import importlib.metadata
import importlib.util
import inspect
import runpy
import sys
from pathlib import Path

import launch

COMMANDS = {
    "convert": "convert.sat_to_orbax",
    "inspect": "convert.inspect",
    "verify": "convert.verify",
    "export-shards": "convert.orbax_to_sat",
    "export-safetensors": "convert.orbax_to_safetensors",
    "merge-adapter": "convert.merge_adapter",
    "generate": "launch.generate",
    "decode": "launch.decode",
    "serve": "launch.serve",
    "prepare-task": "launch.prepare_task",
    "evaluate": "launch.evaluate",
    "harness": "launch.harness",
    "train-tokenizer": "launch.train_tokenizer",
    "prepare-data": "launch.prepare_data",
    "train": "launch.train",
    "finetune": "launch.finetune",
    "plot": "launch.plot",
    "plan": "launch.plan",
    "benchmark": "launch.benchmark",
    "tune": "launch.tune",
    "demo": "launch.demo",
    "env": "launch.env",
}


def main() -> None:
    """Run a command as if its module had been run; end the process with its status.

    Nothing but the command's own module is imported: its imports take seconds.
    """
    name, *arguments = sys.argv[1:] or [""]
    if name == "--version":
        print(f"glm_jax {_version()}")
    elif name in ("--help", "-h", "help") and not arguments:
        print(_help())
    elif name.replace("_", "-") in COMMANDS:
        launch.end_by_interrupt()
        sys.argv = [f"glm-jax {name}", *arguments]
        module = COMMANDS[name.replace("_", "-")]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        _refuse(name)


def _refuse(name: str) -> None:
    close = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
    by_module = [known for known, module in COMMANDS.items() if module.endswith(f".{name}")]
    near = [*by_module, *close][:1]
    hint = f"did you mean {near[0]}? " if near else ""
    given = f"unknown command {name!r}" if name else "no command"
    print(f"error: {given}; {hint}glm-jax --help lists all", file=sys.stderr)
    sys.exit(2)


def _version() -> str:
    try:
        return importlib.metadata.version("glm_jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _help() -> str:
    lines = [inspect.cleandoc(__doc__ or ""), "", "Commands:"]
    for name, module in COMMANDS.items():
        lines.append(f"  {name:<20}{_first_line(module)}")
    return "\n".join(lines)


def _first_line(module: str) -> str:
    """Return the first line of a module's docstring, by its source alone."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    source = Path(spec.origin).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
