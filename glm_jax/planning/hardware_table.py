"""The hardware that the original named, and more: what each holds and how fast it can be."""

import dataclasses

from ml_collections import ConfigDict

from glm_jax.config import GLMConfig
from glm_jax.planning.plan import Plan, Question, make_plan
from glm_jax.planning.reports import Table

_LENGTH = 2048
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
      hardware: a file of configs/hardware.
      cache: dtype of keys and values, that of computing by default.
      limit: GiB of weights that a device holds; the others wait on its host.
      published: seconds that the original took for 2048 tokens, and with what.
      measured: milliseconds of a decode step on such hardware, and when; see
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
    Case("a100_40gb", 8, "float16", published="179.22 (SAT)"),
    Case("v100", 8, "int8"),
    Case("v100", 8, "float16", limit=24),
    Case("rtx_3090", 8, "int8"),
    Case("rtx_3090", 4, "int4", "int8", "150 (FasterTransformer)"),
    Case("rtx_2080_ti", 8, "int4", "int8"),
    Case("a100_40gb", 8, "int4", published="86.0 (FasterTransformer)"),
    Case("v100", 8, "int4", published="125 (FasterTransformer)"),
    Case("h100", 1, "int4", "int8"),
    Case("h100", 2, "int4"),
    Case("h200", 1, "int4", measured="78.8 (2026-11-26)"),
    Case("tpu_v5e", 16, "int4"),
    Case("tpu_v5p", 8, "bfloat16"),
    Case("tpu_v6e", 8, "int8"),
)


def plan_case(case: Case, model: GLMConfig, described: ConfigDict) -> Plan:
    """A decode step of one request of 2048 tokens, tensor-parallel.

    Raises:
      PlanError: the compiler refuses it.
    """
    mesh = (1, 1, case.devices)
    asked = Question(model, "decode", case.precision, mesh, 1, _LENGTH, case.cache)
    asked = dataclasses.replace(asked, weight_memory_limit=case.limit)
    return make_plan(asked, described)


def _cells(case: Case, model: GLMConfig, described: ConfigDict) -> tuple[str, ...]:
    plan = plan_case(case, model, described)
    rest = plan.other + plan.temporaries
    also = f" ({case.cache} cache)" if case.cache else ""
    if plan.streamed:
        also = f" ({plan.streamed / _GIB:.1f} GiB a device on its host)"
    held = " + ".join(f"{size / _GIB:.1f}" for size in (plan.weights, plan.cache, rest))
    seconds = plan.roofline.seconds
    return (
        f"{case.devices} x {described.device_kind}",
        f"{case.precision}{also}",
        f"{held} = {plan.total / _GIB:.1f}",
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
