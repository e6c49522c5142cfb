"""Meshes and batches tried in turn: what fits, what is fastest, the smallest that fits."""

import dataclasses
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from glm_jax.config import GLMConfig
from glm_jax.planning.plan import Plan, PlanError, Question, make_plan

_DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_MOST_BATCH = 1024


@dataclasses.dataclass(frozen=True)
class Tried:
    """A question and its plan, or why there is none."""

    question: Question
    plan: Plan | None
    error: str = ""

    @property
    def rows_per_second(self) -> float:
        """Rows, or in decoding tokens, a second at best."""
        if self.plan is None or not self.plan.fits:
            return 0.0
        asked = self.question
        rows = asked.mesh[1] if asked.job == "prefill" else asked.batch
        return rows * asked.accumulation / self.plan.roofline.seconds


def attempt(question: Question, hardware: ConfigDict) -> Tried:
    """Plans, and keeps the reason where that cannot be."""
    try:
        return Tried(question, make_plan(question, hardware))
    except PlanError as error:
        return Tried(question, None, str(error))


def meshes(model: GLMConfig, devices: int) -> Iterator[tuple[int, int, int]]:
    """Every split of the devices into fsdp and tensor that the model's heads divide by."""
    for tensor in range(1, devices + 1):
        if devices % tensor == 0 and model.num_heads % tensor == 0:
            yield (1, devices // tensor, tensor)


def sweep(question: Question, hardware: ConfigDict, show: Callable[[Tried], None]) -> list[Tried]:
    """Every mesh of the devices, each with batches that double until they no longer fit.

    Args:
      show: called with each as it is there.

    Returns:
      Those that fit, the fastest first.
    """
    fitting = []
    for mesh in meshes(question.model, question.devices):
        batch = mesh[1]
        while batch <= _MOST_BATCH:
            tried = attempt(dataclasses.replace(question, mesh=mesh, batch=batch), hardware)
            show(tried)
            if tried.plan is None or not tried.plan.fits:
                break
            fitting.append(tried)
            if question.job == "prefill":  # which runs one prompt a row, whatever the slots
                break
            batch *= 2
    return sorted(fitting, key=lambda tried: -tried.rows_per_second)


def smallest(question: Question, hardware: ConfigDict) -> Tried | None:
    """The fewest devices that the job fits on, divided by tensor up to 8 and by fsdp beyond."""
    for count in _DEVICES:
        tensor = min(count, 8)
        mesh = (1, count // tensor, tensor)
        batch = max(question.batch, mesh[1])
        tried = attempt(dataclasses.replace(question, mesh=mesh, batch=batch), hardware)
        if tried.plan is not None and tried.plan.fits:
            return tried
    return None
