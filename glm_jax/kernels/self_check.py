"""Whether a kernel is right on this machine's device, before a process uses it.

A process of its own tries it: a kernel that does not end, or that breaks the process's device
context, then breaks nothing else.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from glm_jax import processes

SECONDS = 180.0  # for a process to start, to compile and to end
_ROOT = Path(__file__).parents[2]


def check_apart(
    module: str, argument: str, command: Sequence[str] | None = None, seconds: float = SECONDS
) -> str | None:
    """Run a module as a process of its own; return why its check failed, None if it passed.

    Where jax keeps compiled programs, as commands have it, a pass is noted beside them: the same
    kernels are not checked again on such a device with this version of jax.

    Args:
      module: ends with status 0, or prints a reason and ends with another.
      argument: of the process.
      command: what to run instead.
      seconds: after which the process is ended.
    """
    note = None if command else _note_of_pass(module, argument)
    if note is not None and note.exists():
        return None
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
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
    if not folder or "://" in folder:
        return None
    device = jax.devices()[0]
    about = module, argument, jax.__version__, device.device_kind, device.client.platform_version
    digest = hashlib.sha256(json.dumps(about).encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return Path(folder) / f"checked_{digest.hexdigest()}"


def agreed(check: Callable[[], str | None]) -> str | None:
    """Return what `check` of process 0 returned, in all processes: a reason, or None."""
    reason = check() if processes.is_first() else None
    is_right = processes.agree(float(reason is None))
    return reason if is_right or reason else "process 0 could not use it"
