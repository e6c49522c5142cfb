"""Whether a kernel is right on this machine's device, before a process uses it.

A process of its own tries it: a kernel that does not end, or that breaks the process's device
context, then breaks nothing else.
"""

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm_jax import processes, supervision

SECONDS = 180.0  # for a process to start, to compile and to end
# Relative, of an array's norm: a few roundings of each product's operands.
_TOLERANCES = {"float16": 2e-3, "bfloat16": 1.6e-2}
_PACKAGE = Path(__file__).parents[1]
_COMPILERS = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin")
_STARTED_BY = "GLM_JAX_CHECK_STARTED_BY"  # a variable for the check: this process's number
_DRIVER = Path("/proc/driver/nvidia/version")


@functools.cache
def why_not(module: str, argument: str) -> str | None:
    """Return why a kernel must not be used, None if it is right; in all processes the same.

    Process 0 tries it once, by `check_apart`.
    """
    reason = check_apart(module, argument) if processes.is_first() else None
    is_right = processes.agree(float(reason is None))
    return reason if is_right or reason else "process 0 could not use it"


def check_apart(
    module: str, argument: str, command: Sequence[str] | None = None, seconds: float = SECONDS
) -> str | None:
    """Run a module as a process of its own; return why its check failed, None if it passed.

    Where jax keeps compiled programs, as commands have it, a pass is noted beside them: it is not
    checked again with the same code, versions of jax and driver, flags and kind of device.

    Args:
      module: calls `run`.
      argument: of the process.
      command: what to run instead.
      seconds: after which the process is ended.
    """
    note = None if command else _note_of_pass(module, argument)
    if note is not None and os.path.exists(note):  # False where it may not be looked at
        return None
    paths = [str(_PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        _STARTED_BY: str(os.getpid()),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has most of the memory
    }
    try:
        done = subprocess.run(
            command or [sys.executable, "-m", module, argument],
            env=variables, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"its check did not end within {seconds:g} seconds"
    if done.returncode == 0:
        with contextlib.suppress(OSError):  # it is checked again then
            if note is not None:
                note.parent.mkdir(parents=True, exist_ok=True)
                note.touch()
        return None
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return f"its check failed: {lines[-1] if lines else f'exit status {done.returncode}'}"


def _note_of_pass(module: str, argument: str) -> Path | None:
    """Return the file that says that a check passed; None where jax keeps nothing on a disk."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder or "://" in folder or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    device = jax.devices()[0]
    compilers = *map(_version, _COMPILERS), device.client.platform_version, _driver()
    about = module, argument, device.device_kind, os.environ.get("XLA_FLAGS", ""), compilers
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(_code(_PACKAGE))
    return Path(folder) / f"checked_{digest.hexdigest()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    try:
        return _DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _code(package: Path) -> bytes:
    """Return a hash of all modules: a verdict depends on what quantises and compares, too."""
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.digest()


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a module's `main`, in the process that `check_apart` starts, with its arguments.

    The process ends with the one that started it: a kernel that never ends would keep the GPU.

    Args:
      main: returns the exit status, as `report` does.
    """
    supervision.die_with_parent()
    parent = str(os.getppid())
    if os.environ.get(_STARTED_BY, parent) != parent:  # it ended while modules were imported
        sys.exit("the process that asked for this check has ended")
    sys.exit(main(sys.argv[1:]))


def report(is_for: Callable[[Any], bool], capabilities: str, faults: Iterable[str | None]) -> int:
    """Print the first fault of a kernel.

    Args:
      is_for: whether the kernel is one for a device.
      capabilities: compute capabilities of such devices, in words.
      faults: of each case its fault, or None; looked at on such a device alone.

    Returns:
      The exit status of the process.
    """
    if not is_for(jax.devices()[0]):
        faults = [f"no GPU of compute capability {capabilities} could be used by a second process"]
    fault = next(filter(None, faults), None)
    if fault is not None:
        print(fault)
    return int(fault is not None)


def error_of(got: Float[Array, "..."], exact: Float[Array, "..."], dtype: str) -> str | None:
    """Return how far an array is from the exact one, None where roundings explain it.

    Args:
      dtype: that operands of products were rounded to, float16 or bfloat16.
    """
    difference = jnp.linalg.norm(got.astype(jnp.float32) - exact)
    error = float(difference / jnp.linalg.norm(exact))
    if error <= _TOLERANCES[dtype]:  # NaN is not
        return None
    return f"a relative error of {error:.2g}"
