"""The table of docs/hardware.md: GLM-130B decoding on the original's hardware, and on more."""

import dataclasses

from ml_collections import ConfigDict

from glm_jax.config import GLMConfig
from glm_jax.planning.plan import Plan, PlanRequest, make_plan
from glm_jax.planning.reports import Table

_LENGTH = 2048
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class HardwareCase:
    """A row of the table.

    Attributes:
      hardware: name of a file of configs/hardware.
      devices: size of the tensor axis.
      cache: dtype of keys and values, None for the compute dtype.
      limit: GiB of weights on a device; the others are in its host's memory.
      published: seconds that the original took for 2048 tokens, and its software.
      measured: milliseconds of a decode step on such hardware, and the date; see
        docs/performance.md.
    """

    hardware: str
    devices: int
    precision: str
    cache: str | None = None
    published: str = ""
    limit: float | None = None
    measured: str = ""


CASES = (
    HardwareCase("a100_40gb", 8, "float16", published="179.22 (SAT)"),
    HardwareCase("v100", 8, "int8"),
    HardwareCase("v100", 8, "float16", limit=24.0),
    HardwareCase("rtx_3090", 8, "int8"),
    HardwareCase("rtx_3090", 4, "int4", "int8", "150 (FasterTransformer)"),
    HardwareCase("rtx_2080_ti", 8, "int4", "int8"),
    HardwareCase("a100_40gb", 8, "int4", published="86.0 (FasterTransformer)"),
    HardwareCase("v100", 8, "int4", published="125 (FasterTransformer)"),
    HardwareCase("h100", 1, "int4", "int8"),
    HardwareCase("h100", 2, "int4"),
    HardwareCase("h200", 1, "int4", measured="78.8 (2026-11-26)"),
    HardwareCase("tpu_v5e", 16, "int4"),
    HardwareCase("tpu_v5p", 8, "bfloat16"),
    HardwareCase("tpu_v6e", 8, "int8"),
)


def plan_case(case: HardwareCase, model: GLMConfig, described: ConfigDict) -> Plan:
    """Plan a decode step of one request of 2048 tokens, tensor-parallel.

    Args:
      described: what the case's hardware file returns.

    Raises:
      PlanError: the compiler refuses it.
    """
    mesh = (1, 1, case.devices)
    request = PlanRequest(
        model,
        job="decode",
        precision=case.precision,
        mesh=mesh,
        batch=1,
        length=_LENGTH,
        cache=case.cache,
        weight_memory_limit=case.limit,
    )
    return make_plan(request, described)


def _cells(case: HardwareCase, model: GLMConfig, described: ConfigDict) -> tuple[str, ...]:
    plan = plan_case(case, model, described)
    rest = plan.other + plan.temporaries
    also = f" ({case.cache} cache)" if case.cache else ""
    if plan.streamed:
        also = f" ({plan.streamed / _GIB:.1f} GiB a device on its host)"
    memory = " + ".join(f"{size / _GIB:.1f}" for size in (plan.weights, plan.cache, rest))
    seconds = plan.roofline.seconds
    return (
        f"{case.devices} x {described.device_kind}",
        f"{case.precision}{also}",
        f"{memory} = {plan.total / _GIB:.1f}",
        f"{plan.room / _GIB:.0f}",
        f"{1 - plan.total / plan.room:.0%}",
        f"{1e3 * seconds:.1f} ({plan.roofline.limit})",
        f"{_LENGTH * seconds:.0f}",
        case.published,
        case.measured or "not measured",
    )


TABLE = Table(
    columns=(
        "hardware",
        "weights",
        "holds: weights + cache + rest, GiB",
        "of",
        "headroom",
        "a token at best, ms",
        "2048 tokens at best, s",
        "published, s",
        "a token measured, ms",
    ),
    cases=CASES,
    cells=_cells,
)
