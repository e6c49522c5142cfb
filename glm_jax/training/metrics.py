"""Metrics of a run: a progress bar, TensorBoard, and a line of JSON for each logged step."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX

from glm_jax import processes
from glm_jax.files import write_text
from glm_jax.numerics import array_dtype, einsum, products_as
from glm_jax.progress import progress_bar
from glm_jax.text_files import to_json

METRICS_FILE = "metrics.jsonl"
_PEAK_SIZE = 2048


def measure_peak_flops(compute_dtype: str) -> float:
    """Measure the operations per second of a device in a product of two large matrices."""
    size = _PEAK_SIZE if jax.default_backend() == "cpu" else 4 * _PEAK_SIZE
    square = jnp.ones((size, size), array_dtype(compute_dtype))
    square = jax.device_put(square, jax.local_devices()[0])
    product = jax.jit(lambda x: einsum("ij,jk->ik", x, x))
    times = []
    with products_as(compute_dtype):
        for _ in range(4):
            began = time.perf_counter()
            jax.block_until_ready(product(square))
            times.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(times)


class MetricsLogger:
    """Shows and writes the metrics of a run; only process 0 writes.

    Attributes:
      history: the lines logged by this object.
    """

    def __init__(self, workdir: Path, total: int, done: int, step: int, peak_flops: float):
        """Continue the metrics of a run.

        Args:
          total, done: samples of the whole run, and those before this call.
          step: number of updates before this call; lines of later steps are dropped.
          peak_flops: operations per second of all devices together.
        """
        self.history: list[dict[str, Any]] = []
        self._writes = processes.is_first()
        self._peak, self._began, self._tokens = peak_flops, time.perf_counter(), 0
        if self._writes:
            self._file = workdir / METRICS_FILE
            _drop_lines_after(self._file, step)
            self._lines = self._file.open("a", encoding="utf-8")
            self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))
        # Last: the message of an error above would be on the line of the bar.
        self._bar = progress_bar(
            total=total, initial=done, desc="training", unit="row", disable=not self._writes
        )

    def count(self, rows: int, tokens: int) -> None:
        """Count the rows and tokens of a step."""
        self._bar.update(rows)
        self._tokens += tokens

    def log(self, step: int, metrics: dict[str, Any], flops_per_token: float = 0.0) -> None:
        """Write a line.

        Args:
          metrics: numbers or lists of them.
          flops_per_token: operations of training; adds tokens per second and MFU to the line.
        """
        now = time.perf_counter()
        line: dict[str, Any] = {"step": step} | metrics
        if flops_per_token:
            rate = self._tokens / (now - self._began)
            line |= {"tokens_per_second": rate, "mfu": rate * flops_per_token / self._peak}
            self._began, self._tokens = now, 0
            self._bar.set_postfix(
                loss=f"{line['loss']:.3f}", tok_s=f"{rate:.0f}", mfu=f"{line['mfu']:.0%}"
            )
        self.history.append(line)
        if not self._writes:
            return
        self._lines.write(to_json(line) + "\n")
        self._lines.flush()
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(f"train/{name}", value, step)
        if "activation_scale" in line:
            self._board.add_scalar(
                "train/largest_activation",
                max(scale or 0.0 for scale in line["activation_scale"]),
                step,
            )

    def print(self, message: str) -> None:
        """Print a line above the progress bar, on stderr."""
        if self._writes:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        if self._writes:
            self._lines.close()
            self._board.close()


def to_plain(metrics: dict[str, Any], groups: list[str]) -> dict[str, Any]:
    """Return a step's metrics as numbers and lists, None for numbers that are not finite.

    Args:
      groups: names of the kinds of samples; each that occurs gets its mean loss.
    """
    values = {name: np.asarray(value) for name, value in metrics.items()}
    losses, counts = values.pop("group_losses"), values.pop("group_counts")
    line: dict[str, Any] = {n: _finite(v.tolist()) for n, v in values.items()}
    return line | mean_by_group("loss", losses, counts, groups)


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot express by None."""
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return value if math.isfinite(value) else None


def mean_by_group(
    prefix: str, losses: np.ndarray, counts: np.ndarray, groups: list[str]
) -> dict[str, float]:
    """Return {prefix_GROUP: mean loss} for the groups that had tokens."""
    zipped = zip(groups, losses, counts, strict=True)
    return {
        f"{prefix}_{name}": float(loss / n)
        for name, loss, n in zipped
        if n > 0 and math.isfinite(loss / n)
    }


def _drop_lines_after(file: Path, step: int) -> None:
    """Remove the lines of steps after the checkpoint that the run resumes from."""
    if not file.is_file():
        return
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except ValueError:  # the file ends in the middle of a line
            break
    write_text(file, "".join(lines))
