"""Plans of many meshes and batches: which fit, which is the fastest, which is the smallest."""

import dataclasses
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from glm_jax.config import GLMConfig
from glm_jax.model.training import REMAT_POLICIES
from glm_jax.planning.plan import Plan, PlanError, PlanRequest, make_plan
from glm_jax.training.recipe import Recipe

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

    In training each batch is planned with the remat that recomputes least and fits; where copies
    to hosts' memory bind that, also with the next.

    Args:
      request: its mesh and batch are replaced, and the recipe's remat.
      show: called with each result as soon as it is there.

    Returns:
      The plans that fit, the fastest first.
    """
    fitting = []
    for mesh in meshes(request.model, request.devices):
        batch = mesh[1]
        tried = list(_remats(request))
        while batch <= _MAX_BATCH:
            of_batch = dataclasses.replace(request, mesh=mesh, batch=batch)
            result = attempt(dataclasses.replace(of_batch, recipe=tried[0]), hardware)
            show(result)
            if result.plan is None or not result.plan.fits:
                if len(tried) == 1:
                    break
                tried.pop(0)  # no larger batch fits with it
                continue
            fitting.append(result)
            if result.plan.roofline.limit == "host" and len(tried) > 1:
                tried.pop(0)  # computing again may take less than the copies, of any batch
                continue
            if request.job == "prefill":  # runs one prompt a row, whatever the slots
                break
            batch *= 2
    return sorted(fitting, key=lambda result: -result.rows_per_second)


def _remats(request: PlanRequest) -> Iterator[Recipe | None]:
    """Yield the request's recipe with every remat, the one that recomputes least first."""
    if request.recipe is None:
        yield None
    else:
        for remat in REMAT_POLICIES:
            yield dataclasses.replace(request.recipe, remat=remat)


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
