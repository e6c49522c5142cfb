"""User-defined tasks: classes that task files name by a dotted path.

Importing a module runs it. So a name is looked up in the module's source first, and a module is
imported only if it defines or imports that name.
"""

import ast
import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from glm_jax.evaluation.task_config import TaskConfig, TaskError


def import_task(config: TaskConfig) -> Any:
    """Import what `config.module` names, which runs that module and its packages.

    Raises:
      TaskError: there is no such module or no such class in it, or it cannot be imported.
    """
    said = f"task {config.name}: module {config.module}"
    module, _, name = str(config.module).rpartition(".")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise TaskError(f"{said}: MODULE.CLASS is expected")
    source = _source(module)
    if source is None:
        raise TaskError(f"{said}: there is no Python file of that module")
    try:
        is_there = _defines(ast.parse(source.read_bytes()), name)
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise TaskError(f"{said}: {error}") from error
    if not is_there:
        raise TaskError(f"{said} is no task: {source} has no class {name}")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does
        raise TaskError(f"{said}: {type(error).__name__}: {error}") from error


def _source(module: str) -> Path | None:
    """Return the file of a module, found without running anything."""
    spec: ModuleSpec | None = None
    locations: Any = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        found = (finder.find_spec(path, locations) for finder in sys.meta_path)
        spec = next(filter(None, found), None)
        if spec is None:
            return None
        locations = spec.submodule_search_locations or []
    file = None if spec is None else spec.origin
    return Path(file) if file is not None and file.endswith(".py") else None


def _defines(tree: ast.Module, name: str) -> bool:
    """Return whether a class is defined, or a name imported, at the top of a module."""
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return name in (*classes, *(a.asname or a.name for node in imports for a in node.names))
