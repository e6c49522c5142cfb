"""What a run shows while it runs: a bar, TensorBoard, and a line of JSON a logged step."""

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
from tqdm import tqdm

from glm_jax import processes
from glm_jax.config import GLMConfig
from glm_jax.files import write_text
from glm_jax.model import params as glm_params
from glm_jax.numerics import array_dtype, einsum, products_as
from glm_jax.text_files import to_json

METRICS_FILE = "metrics.jsonl"
_PEAK_SIZE = 2048


def flops_per_token(config: GLMConfig, sequence_length: int, is_frozen: bool = False) -> float:
    """Operations that training takes for a token: six a parameter of the products, and
    attention over the whole sequence; recomputation does not count.

    Args:
      is_frozen: parameters have no gradients: four a parameter.
    """
    weights = glm_params.parameter_count(config)
    attention = 2 * config.num_layers * config.hidden_size * sequence_length
    return (4.0 if is_frozen else 6.0) * weights + 6.0 * attention


def measured_peak_flops(compute_dtype: str) -> float:
    """Operations a second that a device reaches in a product of two large matrices."""
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


class Watcher:
    """Shows and keeps a run's numbers; only process 0 writes.

    Attributes:
      history: the logged lines of this call.
    """

    def __init__(self, workdir: Path, total: int, done: int, step: int, peak_flops: float):
        """Args:
        total, done: samples of the run, and those that were seen before.
        step: updates that were made; later lines of an earlier call are dropped.
        peak_flops: of all devices together.
        """
        self.history: list[dict[str, Any]] = []
        self._writes = processes.is_first()
        self._peak, self._began, self._tokens = peak_flops, time.perf_counter(), 0
        if self._writes:
            self._file = workdir / METRICS_FILE
            _drop_lines_after(self._file, step)
            self._lines = self._file.open("a", encoding="utf-8")
            self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))
        # Last: an error above would stand in the bar's line.
        self._bar = tqdm(
            total=total, initial=done, desc="training", unit="row", disable=not self._writes
        )

    def count(self, rows: int, tokens: int) -> None:
        """Takes note of a step's rows, and of its tokens."""
        self._bar.update(rows)
        self._tokens += tokens

    def log(self, step: int, metrics: dict[str, Any], flops_per_token: float = 0.0) -> None:
        """Writes a line; metrics are numbers or lists of them."""
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

    def tell(self, message: str) -> None:
        """A line above the bar."""
        if self._writes:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        if self._writes:
            self._lines.close()
            self._board.close()


def plain(metrics: dict[str, Any], groups: list[str]) -> dict[str, Any]:
    """Metrics of a step as numbers and lists, with the mean loss of each group seen; None
    for what is not finite."""
    values = {name: np.asarray(value) for name, value in metrics.items()}
    losses, counts = values.pop("group_losses"), values.pop("group_counts")
    line: dict[str, Any] = {n: _finite(v.tolist()) for n, v in values.items()}
    return line | mean_by_group("loss", losses, counts, groups)


def _finite(value: Any) -> Any:
    """A number or a list of them, None in place of what JSON has no word for."""
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return value if math.isfinite(value) else None


def mean_by_group(
    prefix: str, losses: np.ndarray, counts: np.ndarray, groups: list[str]
) -> dict[str, float]:
    """{prefix_GROUP: mean loss} of the groups that had tokens."""
    zipped = zip(groups, losses, counts, strict=True)
    return {
        f"{prefix}_{name}": float(loss / n)
        for name, loss, n in zipped
        if n > 0 and math.isfinite(loss / n)
    }


def _drop_lines_after(file: Path, step: int) -> None:
    """Forgets what was logged after the checkpoint that is gone on from."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # broken off in the middle of a line
            break
    write_text(file, "".join(kept))
