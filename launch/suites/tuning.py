"""A table of measured products for the device that is here; `launch.tune` starts it:

    python -m launch.suites.tuning '{"output": "tables", "seconds": 600, ...}'

The measuring is a process of its own, since a kernel that never ends, or ends the process, is to
cost no more than itself: the first process watches what is on trial, and starts another that leaves
it out.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from glm_jax import cli, supervision
from glm_jax.checkpoints.model_folder import load_config
from glm_jax.checkpoints.random_weights import is_random, random_config
from glm_jax.errors import UserError
from glm_jax.files import locked, read_json, write_text
from glm_jax.kernels import target
from glm_jax.kernels.dispatch import Backend
from glm_jax.kernels.quantized_matmul import measured
from glm_jax.kernels.quantized_matmul.api import BACKENDS
from glm_jax.kernels.quantized_matmul.arguments import Arguments
from glm_jax.quantization import Scheme
from glm_jax.text_files import to_json
from launch.suites.case import process_group
from launch.suites.tuned_products import (
    Case,
    Failure,
    arguments_of,
    can_be_laid_out,
    cases,
    layouts_here,
    linear_shapes,
    measure,
)

# In the output: the candidate that is running for the first time, or the product of those that are
# being compiled.
_TRIAL = "on_trial"
_MAX_TRIAL = 30  # seconds of one candidate
_POLL = 0.2


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
      output: folder of tables.
      seconds: after which no other product is begun.
      checkpoints: model folders, or random:SIZE.
      tensor_parallel: numbers of devices that models are divided among.
      quantization: schemes, those that matter most first; `rows` likewise.
      candidates: block sizes of each backend to try at most.
      one_by_one: compiles each candidate alone.
    """

    output: str
    seconds: float
    checkpoints: Sequence[str]
    tensor_parallel: Sequence[int]
    quantization: Sequence[str]
    rows: Sequence[int]
    candidates: int
    one_by_one: bool = False

    def shapes(self) -> list[tuple[int, int]]:
        """Return [K, N] of all linears.

        Raises:
          UserError: there is no such model.
        """
        shapes: dict[tuple[int, int], None] = {}
        for checkpoint in self.checkpoints:
            config = (random_config if is_random(checkpoint) else load_config)(checkpoint)
            for parallel in self.tensor_parallel:
                shapes.update(dict.fromkeys(linear_shapes(config, parallel)))
        return list(shapes)

    def cases(self, layouts: Sequence[str]) -> list[Case]:
        """Return the products in the order in which they are measured.

        Raises:
          UserError: there is no such model, or no product that can be measured.
        """
        schemes = [Scheme.parse(text) for text in self.quantization]
        ordered = cases(self.shapes(), schemes, self.rows, layouts)
        if not ordered:
            raise UserError(
                f"--quantization={','.join(self.quantization)}: no linear of "
                f"{', '.join(self.checkpoints)} divides into such groups"
            )
        return ordered


def run(request: Request) -> None:
    """Measure until all is measured or there is no more time; print a line for each product.

    Raises:
      UserError: the output cannot be written, or measuring failed as a whole.
    """
    request.cases(("stored",))
    folder = Path(request.output)
    ends = time.monotonic() + request.seconds
    with locked(folder):
        while (seconds := ends - time.monotonic()) > 0:
            write_text(folder / _TRIAL, "null\n")  # before minutes of measuring
            status, failure = _run_worker(
                dataclasses.replace(request, seconds=seconds), folder / _TRIAL
            )
            if failure is not None and "implementation" not in failure:
                print(
                    f"compiling: {failure['reason']}: each candidate alone from here on", flush=True
                )
                request = dataclasses.replace(request, one_by_one=True)
            elif failure is not None:
                _leave_out(folder, failure)
            elif status == 1:
                sys.exit(1)  # it said why
            elif status not in (0, None):
                raise UserError(f"measuring ended with status {status}: run it again to go on")
            else:
                break


def _run_worker(request: Request, trial: Path) -> tuple[int | None, Failure | None]:
    """Return a worker's exit status, None if it had no more time, and what it died of, if that
    was a candidate."""
    command = [
        sys.executable,
        "-m",
        "launch.suites.tuning",
        json.dumps(dataclasses.asdict(request)),
    ]
    ends = time.monotonic() + request.seconds
    try:
        with process_group(command) as process:
            while process.poll() is None:
                time.sleep(_POLL)
                if time.monotonic() > ends:
                    return None, None
                if time.time() - trial.stat().st_mtime > _MAX_TRIAL:
                    running = _on_trial(trial)
                    if running is not None and "implementation" in running:
                        return None, running | {"reason": f"it did not end within {_MAX_TRIAL} s"}
            tried = _on_trial(trial)
            reason = {"reason": f"the process ended with status {process.returncode}"}
            return process.returncode, None if tried is None else reason | tried
    finally:
        trial.unlink(missing_ok=True)


def _on_trial(trial: Path) -> Failure | None:
    record: Failure | None = read_json(trial, UserError, f"{trial} is gone")
    return record


def _leave_out(folder: Path, failure: Failure) -> None:
    """Record a candidate that ended its process in the table of its device."""
    path = measured.path_in(folder, failure.pop("device"))
    table = measured.read(path)
    write_text(path, measured.to_text(table.plus([failure])))
    print(_failure_line(failure), flush=True)


def _failure_line(failure: Failure) -> str:
    blocks = failure["blocks"]
    return f"  left out: {failure['implementation']} {_blocks_text(blocks)}: {failure['reason']}"


def _blocks_text(blocks: dict[str, int] | None) -> str:
    return " ".join(f"{name}={int(value)}" for name, value in (blocks or {}).items())


def measure_all(
    request: Request, backends: Sequence[Backend[Arguments]] = BACKENDS[:-1]
) -> measured.Table:
    """Measure what the table of this device lacks; the table is replaced after each product.

    Args:
      backends: the op's, but for the last resort, which writes a whole matrix out as floats.

    Returns:
      The table, as it is on disk.

    Raises:
      UserError: there is no such model, or the table cannot be read or written.
    """
    ends = time.monotonic() + request.seconds
    folder, device = Path(request.output), target.device_kind()
    path = measured.path_in(folder, device)
    table = measured.read(path) if path.exists() else measured.Table(device)
    write_text(path, measured.to_text(table))  # a table that cannot be written is no use
    layouts = layouts_here(backends)
    every = [case for case in request.cases(layouts) if can_be_laid_out(case.product)]
    todo = [case for case in every if not _is_measured(table, case, backends)]
    print(f"{device}: {len(every)} products, {len(every) - len(todo)} measured before", flush=True)
    longest = 0.0
    for number, case in enumerate(todo):
        if (began := time.monotonic()) + longest > ends:
            print(f"no more time: {len(todo) - number} products are left; run it again to go on")
            break
        trial = lambda record: _trial(folder / _TRIAL, {"device": device} | record)
        limits = request.candidates, request.one_by_one
        try:
            entry, failures = measure(case, backends, trial, table.left_out, *limits)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or _on_trial(folder / _TRIAL) is not None:
                raise
            print(f"{case}: no memory for it and what it is compared with", flush=True)
            continue
        for failure in failures:
            print(_failure_line(failure), flush=True)
        table = table.plus(failures, *filter(None, [entry]))
        write_text(path, measured.to_text(table))
        print(line(case, entry), flush=True)
        longest = max(longest, time.monotonic() - began)
    return table


def _is_measured(table: measured.Table, case: Case, backends: Sequence[Backend[Arguments]]) -> bool:
    """Whether there is an entry, of a backend and blocks that there still are."""
    entry = table.entries.get((case.product, case.rows))
    return entry is not None and (measured.variant(backends, entry, arguments_of(case)) is not None)


@contextlib.contextmanager
def _trial(path: Path, record: Failure) -> Iterator[None]:
    """Note what is running; an error leaves the note, for a device may not survive one."""
    write_text(path, to_json(record))
    try:
        yield
    except Exception as error:
        write_text(path, to_json(record | {"reason": str(error)[:200]}))
        raise
    write_text(path, "null\n")


def line(case: Case, entry: measured.Entry | None) -> str:
    """Return what was found, in a line."""
    if entry is None:
        return f"{case}: nothing that is right"
    name = " ".join(filter(None, (entry.implementation, _blocks_text(entry.blocks))))
    rate = f"{case.weight_bytes / entry.us / 1e6:.3g} TB/s of the weight"
    speed = f"{entry.float16_us / entry.us:.2f} times float16's speed"
    return f"{case}: {name}: {entry.us:.4g} us, {rate}, {speed}"


def report() -> Iterator[str]:
    """Yield what the tables in use hold for the device that is here.

    Raises:
      UserError: a table cannot be read.
    """
    device = target.device_kind()
    tables = measured.tables(device, os.environ.get(measured.FOLDER))
    if not tables:
        yield f"{device}: no table, so that each kernel's rules choose; --measure makes one"
    for path, table in tables.items():
        yield f"{path}: {len(table.entries)} products, {len(table.left_out)} candidates left out"
        for (product, rows), entry in table.entries.items():
            case = Case(product, rows)
            is_current = _is_measured(table, case, BACKENDS)
            note = "" if is_current else "; no kernel here takes these blocks: measure again"
            yield line(case, entry) + note


def main() -> None:
    supervision.die_with_parent()
    request = Request(**json.loads(sys.argv[1]))
    cli.set_up_compiler()
    try:
        measure_all(request)
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception:
        if _on_trial(Path(request.output) / _TRIAL) is None:
            raise
        sys.exit(1)  # the first process says what it was


if __name__ == "__main__":
    main()
