"""The GPU suite: each part in a process of its own, with the time that it may take.

This process never touches the device: a part may need nearly all of its memory.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glm_jax.errors import UserError

Results = dict[str, Any]

# Seconds that each part may take, under five minutes together. What one leaves goes to the next.
PARTS = {"rates": 15, "decode": 70, "train": 70, "torch": 70, "pages": 15, "products": 50}
_SHARED_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # PyTorch takes memory too
_ALL_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}  # the 130B in INT4 on 80 GB
_NO_GPU = "needs a GPU"  # see `gpu_parts.main`


def measure(
    skipped: Sequence[str], shapes: str, checkpoint: str, quantization: str | None
) -> Results:
    """Runs the parts one after another.

    Args:
      skipped: names of `PARTS`.
      shapes: of `gpu_parts.SHAPES`.
      checkpoint: a model folder or random:SIZE, for decode steps and prefills.

    Returns:
      What was measured and with what, and under "left_out" why something was not.

    Raises:
      UserError: there is no GPU.
    """
    results: Results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "left_out": dict.fromkeys(skipped, "skipped"),
        "rates": {},
        "products": [],
        "pages": [],
        "decode": [],
        "prefill": [],
        "train": [],
    }
    spare = 0.0
    for name, arguments, variables, share in _runs(checkpoint, quantization):
        if name in skipped:
            continue
        limit = share + spare
        print(f"{' '.join(arguments)}: up to {limit:.0f} s", flush=True)
        began = time.monotonic()
        lines, failure = _run_part([*arguments, f"--shapes={shapes}"], variables, limit)
        spare = max(0.0, limit - (time.monotonic() - began))
        if failure is not None:
            if _NO_GPU in failure:
                raise UserError(failure)
            results["left_out"][" ".join(arguments)] = failure
        for line in lines:
            _add(results, line)
    return results


def _runs(
    checkpoint: str, quantization: str | None
) -> Iterator[tuple[str, list[str], dict[str, str], float]]:
    """Of each process its part, arguments, environment and seconds. Products, of which any
    number is worth having, are last and get what is left."""
    model = [f"--checkpoint={checkpoint}"]
    model += [] if quantization is None else [f"--quantization={quantization}"]
    yield "rates", ["rates"], {}, PARTS["rates"]
    yield "decode", ["decode", *model], _ALL_MEMORY, PARTS["decode"]
    for rate in (0.0, 0.1):  # ours and PyTorch's in turn: a device that slows down slows both
        yield "train", ["train", f"--dropout={rate}"], _ALL_MEMORY, PARTS["train"] / 2
        yield "torch", ["torch_train", f"--dropout={rate}"], {}, PARTS["torch"] / 2
    yield "pages", ["pages"], {}, PARTS["pages"]
    yield "products", ["products"], _SHARED_MEMORY, PARTS["products"]


def _run_part(
    arguments: list[str], variables: dict[str, str], limit: float
) -> tuple[list[Results], str | None]:
    """What a part wrote, and why it did not end well."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.jsonl"
        command = [sys.executable, "-m", "launch.suites.gpu_parts", *arguments]
        log = Path(folder) / "log"
        with log.open("w+", encoding="utf-8") as file:
            process = subprocess.Popen(
                [*command, f"--output={output}"],
                env=os.environ | variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # torch.compile has processes of its own
            )
            failure = None
            try:
                if process.wait(limit):
                    failure = _last_line(log)
            except subprocess.TimeoutExpired:
                failure = f"no more time after {limit:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        text = output.read_text(encoding="utf-8") if output.exists() else ""
    # The last line may be half written.
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], failure


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "ended without a word"


def _add(results: Results, line: Results) -> None:
    """Puts a line of a part where it belongs."""
    if "device" in line or "model" in line:
        results.update(line)
    elif "rows" in line:
        results["products"].append(line)
    elif "cache" in line:
        results["pages"].append(line)
    elif "batch" in line:
        results["decode"].append(line)
    elif "prefill" in line:
        results["prefill"].append(line)
    elif "program" in line:
        results["train"].append(line)
    else:
        results["rates"].update(line)
