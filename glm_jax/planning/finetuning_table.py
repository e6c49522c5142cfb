"""The table of docs/finetuning.md: GLM-130B fine-tuned by adapters and as a whole."""

import dataclasses
import math

from ml_collections import ConfigDict

from glm_jax.config import GLMConfig
from glm_jax.model.adapters import AdapterConfig
from glm_jax.planning.plan import Plan, PlanRequest, make_plan
from glm_jax.planning.reports import Table
from glm_jax.training.recipe import Recipe

_LENGTH = 1024
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class FinetuningCase:
    """A row of the table.

    Attributes:
      hardware: name of a file of configs/hardware.
      mesh: sizes of data, fsdp and tensor.
      rows: of 1024 tokens at once; about as many as leave a tenth of the memory free.
      precision: of the weights beside adapters, or the compute dtype.
      param_dtype: of the parameters where all are trained; "" for adapters.
      moments, offload: see `Recipe`.
    """

    hardware: str
    mesh: tuple[int, int, int]
    rows: int
    precision: str
    param_dtype: str = ""
    moments: str = "float32"
    offload: bool = False


CASES = (
    FinetuningCase("a100_40gb", (1, 1, 8), 48, "int4"),
    FinetuningCase("a100_40gb", (1, 1, 8), 8, "bfloat16"),
    FinetuningCase("a100_40gb", (1, 1, 4), 20, "int4"),
    FinetuningCase("rtx_3090", (1, 1, 8), 20, "int4"),
    FinetuningCase("rtx_3090", (1, 1, 8), 6, "int8"),
    FinetuningCase("rtx_3090", (1, 1, 4), 4, "int4"),
    FinetuningCase("v100", (1, 1, 8), 28, "int4"),
    FinetuningCase("h100", (1, 1, 1), 1, "int4"),
    FinetuningCase("a100_80gb", (1, 1, 8), 12, "bfloat16", "bfloat16", "factored"),
    FinetuningCase("a100_80gb", (1, 1, 8), 12, "bfloat16", "bfloat16", "int8", True),
    FinetuningCase("a100_80gb", (1, 2, 8), 32, "bfloat16", "bfloat16", "int8"),
    FinetuningCase("a100_80gb", (1, 2, 8), 2, "float16", "float32", "float32", True),
    FinetuningCase("a100_80gb", (1, 4, 8), 96, "float16", "float32", "int8"),
    FinetuningCase("a100_80gb", (1, 4, 8), 4, "float16", "float32", "float32"),
    FinetuningCase("tpu_v5p", (1, 1, 8), 4, "bfloat16", "bfloat16", "factored"),
)


def plan_request(case: FinetuningCase, model: GLMConfig) -> PlanRequest:
    """Return the request of a case."""
    adapter = None if case.param_dtype else AdapterConfig(rank=16, dropout=0.05)
    recipe = Recipe(
        total_samples=10_000,
        dropout=0.0,
        attention_dropout=0.0,
        remat="blocks",
        loss_scaling=case.precision == "float16",
        moments=case.moments,
        offload_moments=case.offload,
        adapter=adapter,
    )
    model = model.replace(param_dtype=case.param_dtype or "float32")
    return PlanRequest(model, "train", case.precision, case.mesh, case.rows, _LENGTH, recipe=recipe)


def plan_case(case: FinetuningCase, model: GLMConfig, described: ConfigDict) -> Plan:
    """Plan a train step of a case.

    Args:
      described: what the case's hardware file returns.

    Raises:
      PlanError: the compiler refuses it.
    """
    return make_plan(plan_request(case, model), described)


def described_case(case: FinetuningCase, hardware: ConfigDict) -> tuple[str, ...]:
    """Return the cells that describe a case."""
    mesh = " x ".join(map(str, case.mesh[1:]))
    trained = "adapters" if not case.param_dtype else f"all, {case.param_dtype}"
    moments = case.moments + (" on the host" if case.offload else "")
    return (
        f"{math.prod(case.mesh)} x {hardware.device_kind} ({mesh})",
        trained,
        case.precision,
        moments,
        str(case.rows),
    )


def _cells(case: FinetuningCase, model: GLMConfig, hardware: ConfigDict) -> tuple[str, ...]:
    plan = plan_case(case, model, hardware)
    seconds = plan.roofline.seconds
    return (
        *described_case(case, hardware),
        f"{plan.total / _GIB:.1f}",
        f"{plan.room / _GIB:.0f}",
        f"{plan.streamed / _GIB:.1f}",
        f"{seconds:.2f} ({plan.roofline.limit})",
        f"{case.rows * _LENGTH / seconds:.0f}",
    )


TABLE = Table(
    columns=(
        "hardware (fsdp x tensor)",
        "trained",
        "weights, or computing",
        "moments",
        "rows of 1024",
        "holds, GiB",
        "of",
        "on the host, GiB",
        "a step at best, s",
        "tokens a second at best",
    ),
    cases=CASES,
    cells=_cells,
)
