"""The GPU suite: each part in a process of its own, with the time that it may take.

This process never touches the device: a part may need nearly all of its memory.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from glm_jax.errors import UserError
from glm_jax.model import gpu_layout
from launch.suites import gpu_checks
from launch.suites.case import process_group

Results = dict[str, Any]

# Seconds that each part may take. What one leaves goes to the next.
PARTS = {
    "rates": 20,
    "checks": 95,
    "decode": 145,
    "train": 120,
    "torch": 80,
    "pages": 20,
    "products": 60,
}
_SHARED_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # PyTorch takes memory too
_ALL_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}  # the 130B in INT4 on 80 GB
_POLL = 0.2  # seconds
_NO_GPU = "needs a GPU"  # see `gpu_parts.main`


def measure(
    skipped: Sequence[str],
    shapes: str,
    checkpoint: str,
    quantization: str | None,
    save: Callable[[Results], None] = lambda _: None,
) -> Results:
    """Run the parts one after another, and print each result as it comes.

    Args:
      skipped: names of `PARTS`.
      shapes: of `gpu_parts.SHAPES`.
      checkpoint: a model folder or random:SIZE, for decode steps and prefills.
      save: takes what there is so far, after each result: a run may be ended at any moment.

    Returns:
      What was measured and with what, and under "left_out" why something was not.

    Raises:
      UserError: there is no GPU.
    """
    results: Results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "left_out": dict.fromkeys(skipped, "skipped"),
        "checks": {},
        "warnings": [],
        "rates": {},
        "products": [],
        "pages": [],
        "decode": [],
        "prefill": [],
        "train": [],
    }

    def take(line: Results) -> None:
        print(f"  {json.dumps(line)}", flush=True)
        _add(results, line)
        save(results)

    spare = 0.0
    for name, arguments, variables, share in _runs(checkpoint, quantization, results):
        if name in skipped:
            continue
        limit = share + spare
        print(f"{' '.join(arguments)}: up to {limit:.0f} s", flush=True)
        began = time.monotonic()
        failure = _run_part([*arguments, f"--shapes={shapes}"], variables, limit, take)
        spare = max(0.0, limit - (time.monotonic() - began))
        if failure is not None:
            if _NO_GPU in failure:
                raise UserError(failure)
            print(f"  {failure}", flush=True)
            results["left_out"][" ".join(arguments)] = failure
            save(results)
    return results


def _runs(
    checkpoint: str, quantization: str | None, results: Results
) -> Iterator[tuple[str, list[str], dict[str, str], float]]:
    """Of each process its part, arguments, environment and seconds. Products, of which any
    number is worth having, are last and get what is left.

    Args:
      results: so far; kernels whose check failed are not used, nor tried again.
    """
    model = [f"--checkpoint={checkpoint}"]
    model += [] if quantization is None else [f"--quantization={quantization}"]
    yield "rates", ["rates"], {}, PARTS["rates"]
    yield "checks", ["checks"], _SHARED_MEMORY, PARTS["checks"]
    faulty = {name for name, check in results["checks"].items() if check["fault"] is not None}
    layout = {gpu_layout.VARIABLE: "stored"} if faulty - {gpu_checks.ATTENTION} else {}
    attention = ["--attention=blockwise"] if gpu_checks.ATTENTION in faulty else []
    yield "decode", ["decode", *model], _ALL_MEMORY | layout, PARTS["decode"]
    for rate in (0.0, 0.1):  # ours and PyTorch's in turn: a device that slows down slows both
        ours = ["train", f"--dropout={rate}", *attention]
        yield "train", ours, _ALL_MEMORY, PARTS["train"] / 2
        yield "torch", ["torch_train", f"--dropout={rate}"], _SHARED_MEMORY, PARTS["torch"] / 2
    yield "pages", ["pages"], {}, PARTS["pages"]
    yield "products", ["products"], _SHARED_MEMORY | layout, PARTS["products"]


def _run_part(
    arguments: list[str],
    variables: dict[str, str],
    limit: float,
    take: Callable[[Results], None],
) -> str | None:
    """Give what a part writes to `take`, line by line; return why it did not end well."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.jsonl"
        output.touch()
        command = [sys.executable, "-m", "launch.suites.gpu_parts", *arguments]
        log = Path(folder) / "log"
        with log.open("w+", encoding="utf-8") as file, output.open(encoding="utf-8") as written:
            ends, text, has_ended = time.monotonic() + limit, "", False
            options = {"env": os.environ | variables, "stdout": file, "stderr": subprocess.STDOUT}
            # A group, for torch.compile has processes of its own.
            with process_group([*command, f"--output={output}"], **options) as process:
                while not has_ended and time.monotonic() < ends:
                    has_ended = process.poll() is not None
                    # The last line may be half written.
                    *lines, text = (text + written.read()).split("\n")
                    for line in lines:
                        take(json.loads(line))
                    time.sleep(0 if has_ended else _POLL)
        if not has_ended:
            return f"no more time after {limit:.0f} s"
        return _last_line(log) if process.returncode else None


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "ended without a word"


def _add(results: Results, line: Results) -> None:
    """Put a line of a part where it belongs."""
    if "device" in line or "model" in line:
        results.update(line)
    elif "warning" in line:
        results["warnings"].append(line["warning"])
    elif "check" in line:
        results["checks"][line["check"]] = line
    elif "rows" in line:
        results["products"].append(line)
    elif "cache" in line:
        _add_pages(results["pages"], line)
    elif "batch" in line:
        results["decode"].append(line)
    elif "prefill" in line:
        results["prefill"].append(line)
    elif "program" in line:
        results["train"].append(line)
    else:
        results["rates"].update(line)


def _add_pages(found: list[Results], line: Results) -> None:
    """Put an implementation's results beside those of others for the same pages."""
    for each in found:
        if (each["cache"], each["heads"]) == (line["cache"], line["heads"]):
            for of in ("us", "share", "error"):
                each[of] |= line[of]
            return
    found.append(line)
