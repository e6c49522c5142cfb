"""The table of docs/evaluating.md: hours of GLM-130B for multiple-choice tasks of known sizes."""

import dataclasses

from ml_collections import ConfigDict

from glm_jax.config import GLMConfig
from glm_jax.planning.plan import PlanRequest, make_plan
from glm_jax.planning.reports import Table

# As `Scorer` batches them by default: 4096 tokens at once, in rows of 512.
_ROWS, _WIDTH = 8, 512
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Load:
    """A multiple-choice task.

    Attributes:
      examples: of the split that lm-evaluation-harness scores.
      context, choice: tokens of one, about.
    """

    name: str
    examples: int
    choices: int
    context: int
    choice: int

    def tokens(self, shares_contexts: bool) -> int:
        """Return the tokens to run, with each context once, or once a choice."""
        contexts = 1 if shares_contexts else self.choices
        return self.examples * (contexts * (self.context + 1) + self.choices * self.choice)


QNLI = Load("QNLI", 5463, choices=2, context=70, choice=1)
MATH_QA = Load("MathQA", 2985, choices=5, context=75, choice=6)
QNLI_5_SHOT = dataclasses.replace(QNLI, name="QNLI, 5 shots", context=420)
MATH_QA_5_SHOT = dataclasses.replace(MATH_QA, name="MathQA, 5 shots", context=480)
LOADS = (QNLI, MATH_QA, QNLI_5_SHOT, MATH_QA_5_SHOT)


@dataclasses.dataclass(frozen=True)
class EvaluationCase:
    """A row of the table.

    Attributes:
      hardware: name of a file of configs/hardware.
      devices: size of the tensor axis.
      precision: of the weights.
    """

    hardware: str
    devices: int
    precision: str


CASES = (
    EvaluationCase("h200", 1, "int4"),
    EvaluationCase("a100_40gb", 8, "bfloat16"),
    EvaluationCase("a100_40gb", 8, "int4"),
)


def _cells(case: EvaluationCase, model: GLMConfig, described: ConfigDict) -> tuple[str, ...]:
    mesh = (1, 1, case.devices)
    plan = make_plan(PlanRequest(model, "evaluate", case.precision, mesh, _ROWS, _WIDTH), described)
    seconds = plan.roofline.seconds
    return (
        f"{case.devices} x {described.device_kind}",
        case.precision,
        f"{plan.total / _GIB:.1f} of {plan.room / _GIB:.0f}",
        f"{1e3 * seconds:.0f} ({plan.roofline.limit})",
        *(_hours(load, seconds) for load in LOADS),
    )


def _hours(load: Load, seconds: float) -> str:
    """Return hours with contexts shared, and without.

    Args:
      seconds: of a batch.
    """
    shared, apart = (load.tokens(s) / (_ROWS * _WIDTH) * seconds / 3600 for s in (True, False))
    return f"{shared:.2f} ({apart:.2f})"


TABLE = Table(
    columns=(
        "hardware",
        "weights",
        "holds, GiB",
        f"{_ROWS * _WIDTH} tokens at best, ms",
        *(f"{load.name}, h" for load in LOADS),
    ),
    cases=CASES,
    cells=_cells,
)
