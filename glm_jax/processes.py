"""The processes of one run: how they find each other, and what they agree on."""

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
# Slurm and a Kubernetes indexed Job set a process's index in the last two.
_INDICES = ("GLM_JAX_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
HEARTBEAT_SECONDS = 60
_Result = TypeVar("_Result")


class ProcessesError(UserError):
    """Processes that cannot find each other; the message says what to set."""


def resolve(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    may_be_apart: bool = False,
) -> tuple[str | None, int, int]:
    """Return the coordinator, this process's index and the number of processes.

    Arguments that are None come from the environment: GLM_JAX_COORDINATOR,
    GLM_JAX_NUM_PROCESSES, and GLM_JAX_PROCESS_ID, Slurm's SLURM_PROCID or a Kubernetes
    indexed Job's JOB_COMPLETION_INDEX. Without a coordinator the process is alone.

    Args:
      coordinator: host:port of process 0.
      count: number of processes.
      index: of this process, from 0.
      may_be_apart: allow several processes without a coordinator, which share work alone.

    Raises:
      ProcessesError: some of the three are known and some are not.
    """
    coordinator = coordinator or os.environ.get(_COORDINATOR)
    count = count if count is not None else _number(_COUNT)
    for name in _INDICES:
        index = index if index is not None else _number(name)
    if coordinator is None:
        if count is None or count == 1:
            return None, 0, 1
        if may_be_apart and index is not None and index < count:
            return None, index, count
        missing = "its index below that by --process_id, or " if may_be_apart else ""
        raise ProcessesError(
            f"{count} processes and no coordinator: give {missing}host:port of process 0 by "
            f"--coordinator or {_COORDINATOR}"
        )
    if count is None or index is None:
        raise ProcessesError(
            f"coordinator {coordinator} without the number of processes and this one's index: "
            f"--num_processes and --process_id, or {_COUNT} and {_INDICES[0]}"
        )
    return coordinator, index, count


def join(
    coordinator: str,
    index: int,
    count: int,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    saves_at_sigterm: bool = False,
) -> None:
    """Join the other processes of a run, before any other use of jax.

    Args:
      coordinator, index, count: see `resolve`.
      heartbeat_seconds: without a heartbeat for this time a process counts as dead, and the
        others end.
      saves_at_sigterm: `multihost_utils.reached_preemption_sync_point` reports SIGTERM, which
        otherwise ends the process.

    Raises:
      ProcessesError: the other processes cannot be reached.
    """
    jax.config.update("jax_enable_preemption_service", saves_at_sigterm)
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=heartbeat_seconds
        )
    except (ValueError, RuntimeError) as error:
        raise ProcessesError(f"process {index} of {count} at {coordinator}: {error}") from error


def are_joined() -> bool:
    """Return True if this process has joined others, which fail if it ends before them."""
    return bool(jax.distributed.is_initialized())


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ProcessesError(f"{name}={text!r} in the environment is not an integer") from error


def is_first() -> bool:
    """Return True for the process that writes what is to be written once."""
    return jax.process_index() == 0


def agree(value: float) -> float:
    """Return process 0's value in all processes."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def wait(name: str) -> None:
    """Return when all processes have called this."""
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices(name)


def gather(value: dict[str, Any]) -> dict[str, Any]:
    """Return the union of all processes' dictionaries, plain JSON; later processes win."""
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
    """Call `attempt` in all processes; if it fails in one, raise an error in all.

    So none waits for another that has ended.

    Args:
      attempt: must not run collectives.
      kinds: classes of errors that keep their class in the other processes; errors of other
        classes become UserErrors there.

    Raises:
      UserError: the error of the first process that failed, in all of them. This process's own
        error keeps its class.
    """
    own: Exception | None = None
    try:
        result = attempt()
    except Exception as error:
        own = error
    rank = jax.process_index()
    failures = gather({} if own is None else {str(rank): _described(own, kinds)})
    if not failures:
        return result
    first = min(failures, key=int)
    if own is not None and int(first) == rank:
        raise own
    index, message = failures[first]
    raise (UserError if index is None else kinds[index])(message)


def _described(error: Exception, kinds: tuple[type[UserError], ...]) -> tuple[int | None, str]:
    """Return the index of an error's class in `kinds`, and its message."""
    index = next((i for i, kind in enumerate(kinds) if isinstance(error, kind)), None)
    if isinstance(error, UserError):
        return index, str(error)
    return index, f"process {jax.process_index()} failed: {type(error).__name__}: {error}"
