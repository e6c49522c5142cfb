"""A plot of a run's metrics."""

import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from glm_jax.errors import UserError
from glm_jax.files import replacing
from glm_jax.training.metrics import METRICS_FILE

Line = dict[str, Any]


def read(workdir: Path) -> list[Line]:
    """Read the logged lines of a run.

    Raises:
      UserError: there are none, or the file cannot be read.
    """
    file = workdir / METRICS_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give the workdir of a training run") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{file}:{number}: no JSON: {error}") from error
    if not lines:
        raise UserError(f"{file} is empty: nothing was logged yet")
    return lines


def draw(lines: list[Line], output: Path) -> None:
    """Plot losses, learning rate, norms and activation scales over steps.

    Spikes are red dots, skipped steps are red crosses.
    """
    figure, all_axes = pyplot.subplots(2, 2, figsize=(13, 8), layout="constrained")
    (losses, rates), (norms, scales) = all_axes
    steps = [line for line in lines if "loss" in line]
    good = [line for line in steps if not line["is_skipped"]]
    names = sorted({name for line in lines for name in line if name.startswith("loss_")})
    for name in (n for n in names if n != "loss_scale"):
        _curve(losses, good, name, linewidth=0.8, alpha=0.6)
    _curve(losses, good, "loss", color="black")
    held_out = [line for line in lines if "evaluation_loss" in line]
    _curve(losses, held_out, "evaluation_loss", color="tab:blue", marker="o", markersize=3)
    _curve(rates, good, "learning_rate", color="black")
    _curve(norms, good, "gradient_norm", color="black")
    _curve(norms, good, "update_norm", color="tab:gray")
    spikes = [line for line in good if line["is_spike"]]
    skipped = [line for line in steps if line["is_skipped"]]
    for axes, name in ((losses, "loss"), (norms, "gradient_norm")):
        _curve(axes, spikes, name, "spike", color="tab:red", linestyle="", marker="o")
        _curve(axes, skipped, name, "skipped", color="tab:red", linestyle="", marker="x")
    for layer in range(len(good[0]["activation_scale"]) if good else 0):
        heights = [line["activation_scale"][layer] for line in good]
        scales.plot([line["step"] for line in good], heights, label=f"layer {layer}", linewidth=0.8)
    titles = ("loss, nats a token", "learning rate", "norms", "activations, root mean square")
    for axes, title in zip(all_axes.flat, titles, strict=True):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if 0 < len(axes.get_lines()) <= 12:
            axes.legend(fontsize="small")
    norms.set_yscale("log")
    with replacing(output) as partial:
        figure.savefig(partial, format="png")
    pyplot.close(figure)


def _curve(axes: Any, lines: list[Line], name: str, label: str = "", **style: Any) -> None:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label or name, **style)
