"""Several processes of one run: how they find each other, and what they agree on."""

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from glm_jax.errors import UserError

_COORDINATOR = "GLM_JAX_COORDINATOR"
_COUNT = "GLM_JAX_NUM_PROCESSES"
# Slurm and a Kubernetes indexed Job say a process's number in the last two.
_NUMBERS = ("GLM_JAX_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
HEARTBEAT_SECONDS = 60
_Result = TypeVar("_Result")


class ProcessesError(UserError):
    """Processes that cannot find each other; the message says what to set."""


def place(
    coordinator: str | None = None,
    count: int | None = None,
    number: int | None = None,
    may_be_apart: bool = False,
) -> tuple[str | None, int, int]:
    """Where this process stands among those of a run.

    What is not given is taken from the environment: GLM_JAX_COORDINATOR,
    GLM_JAX_NUM_PROCESSES, and GLM_JAX_PROCESS_ID, Slurm's SLURM_PROCID or a Kubernetes
    indexed Job's JOB_COMPLETION_INDEX. Without a coordinator the process is alone.

    Args:
      coordinator: host:port of process 0.
      count: processes.
      number: this process's, from 0.
      may_be_apart: processes without a coordinator are fine: they only share work.

    Returns:
      The coordinator, this process's number, and how many there are.

    Raises:
      ProcessesError: some of the three are known and some are not.
    """
    coordinator = coordinator or os.environ.get(_COORDINATOR)
    count = count if count is not None else _number(_COUNT)
    for name in _NUMBERS:
        number = number if number is not None else _number(name)
    if coordinator is None:
        if count is None or count == 1:
            return None, 0, 1
        if may_be_apart and number is not None and number < count:
            return None, number, count
        missing = "its number below that by --process_id, or " if may_be_apart else ""
        raise ProcessesError(
            f"{count} processes and no coordinator: give {missing}host:port of process 0 by "
            f"--coordinator or {_COORDINATOR}"
        )
    if count is None or number is None:
        raise ProcessesError(
            f"coordinator {coordinator}, but not the number of processes and this one's: "
            f"--num_processes and --process_id, or {_COUNT} and {_NUMBERS[0]}"
        )
    return coordinator, number, count


def join(
    coordinator: str,
    number: int,
    count: int,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    saves_at_sigterm: bool = False,
) -> None:
    """Joins the other processes of a run, before anything else of jax is used.

    Args:
      coordinator, number, count: as of `place`.
      heartbeat_seconds: a process that gave no sign of life for so long counts as gone, and
        the others end.
      saves_at_sigterm: SIGTERM is for `multihost_utils.reached_preemption_sync_point` to report;
        otherwise it ends the process.

    Raises:
      ProcessesError: they cannot be reached.
    """
    jax.config.update("jax_enable_preemption_service", saves_at_sigterm)
    try:
        jax.distributed.initialize(
            coordinator, count, number, heartbeat_timeout_seconds=heartbeat_seconds
        )
    except (ValueError, RuntimeError) as error:
        raise ProcessesError(f"process {number} of {count} at {coordinator}: {error}") from error


def are_joined() -> bool:
    """Whether this process has joined others, and so cannot leave in peace while they run."""
    return bool(jax.distributed.is_initialized())


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ProcessesError(f"{name}={text!r} in the environment is no number") from error


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def agree(value: float) -> float:
    """Process 0's value, in all of them."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def wait(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices(name)


def gather(value: dict[str, Any]) -> dict[str, Any]:
    """The dictionaries of all processes as one, plain JSON; later ones win."""
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(content)]))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    joined: dict[str, Any] = {}
    for row, length in zip(rows, lengths.ravel(), strict=True):
        joined |= json.loads(row[:length].tobytes())
    return joined


def together(attempt: Callable[[], _Result], *kinds: type[UserError]) -> _Result:
    """Calls `attempt`, which exchanges nothing, in all processes; where it fails in one, it fails
    in all, and none waits for another that has ended.

    Args:
      kinds: errors that are of their kind in every process; others are UserErrors elsewhere.

    Raises:
      UserError: the error of the first process that failed, in all of them. Of another kind is
        an error of this process itself.
    """
    own: Exception | None = None
    try:
        result = attempt()
    except Exception as error:
        own = error
    number = jax.process_index()
    failures = gather({} if own is None else {str(number): _described(own, kinds)})
    if not failures:
        return result
    first = min(failures, key=int)
    if own is not None and int(first) == number:
        raise own
    index, message = failures[first]
    raise (UserError if index is None else kinds[index])(message)


def _described(error: Exception, kinds: tuple[type[UserError], ...]) -> tuple[int | None, str]:
    """Which of the kinds an error is, and its message."""
    index = next((i for i, kind in enumerate(kinds) if isinstance(error, kind)), None)
    if isinstance(error, UserError):
        return index, str(error)
    return index, f"process {jax.process_index()} failed: {type(error).__name__}: {error}"
