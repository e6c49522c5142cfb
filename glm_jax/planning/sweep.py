"""Plans of many meshes and batches: which fit, which is the fastest, which is the smallest."""

import dataclasses
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from glm_jax.config import GLMConfig
from glm_jax.planning.plan import Plan, PlanError, PlanRequest, make_plan

_DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_MAX_BATCH = 1024


@dataclasses.dataclass(frozen=True)
class PlanResult:
    """A request with its plan, or the reason why there is none."""

    request: PlanRequest
    plan: Plan | None
    error: str = ""

    @property
    def rows_per_second(self) -> float:
        """Rows per second at best; in decoding, tokens per second."""
        if self.plan is None or not self.plan.fits:
            return 0.0
        request = self.request
        rows = request.mesh[1] if request.job == "prefill" else request.batch
        return rows * request.accumulation / self.plan.roofline.seconds


def attempt(request: PlanRequest, hardware: ConfigDict) -> PlanResult:
    """Return the plan of a request, or the reason why it cannot be planned."""
    try:
        return PlanResult(request, make_plan(request, hardware))
    except PlanError as error:
        return PlanResult(request, None, str(error))


def meshes(model: GLMConfig, devices: int) -> Iterator[tuple[int, int, int]]:
    """Yield every mesh of the devices whose tensor axis divides the model's heads."""
    for tensor in range(1, devices + 1):
        if devices % tensor == 0 and model.num_heads % tensor == 0:
            yield (1, devices // tensor, tensor)


def sweep(
    request: PlanRequest, hardware: ConfigDict, show: Callable[[PlanResult], None]
) -> list[PlanResult]:
    """Plan every mesh of the devices, each with batches that double while they fit.

    Args:
      request: its mesh and batch are replaced.
      show: called with each result as soon as it is there.

    Returns:
      The plans that fit, the fastest first.
    """
    fitting = []
    for mesh in meshes(request.model, request.devices):
        batch = mesh[1]
        while batch <= _MAX_BATCH:
            result = attempt(dataclasses.replace(request, mesh=mesh, batch=batch), hardware)
            show(result)
            if result.plan is None or not result.plan.fits:
                break
            fitting.append(result)
            if request.job == "prefill":  # runs one prompt a row, whatever the slots
                break
            batch *= 2
    return sorted(fitting, key=lambda result: -result.rows_per_second)


def smallest(request: PlanRequest, hardware: ConfigDict) -> PlanResult | None:
    """Return the plan with the fewest devices that fits: tensor axis up to 8, then fsdp."""
    for count in _DEVICES:
        tensor = min(count, 8)
        mesh = (1, count // tensor, tensor)
        batch = max(request.batch, mesh[1])
        result = attempt(dataclasses.replace(request, mesh=mesh, batch=batch), hardware)
        if result.plan is not None and result.plan.fits:
            return result
    return None
