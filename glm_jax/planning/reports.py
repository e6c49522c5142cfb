"""Report plans: a line, a table, JSON, a plot."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from ml_collections import ConfigDict

from glm_jax.config import GLMConfig
from glm_jax.files import replacing
from glm_jax.planning.collectives import by_kind
from glm_jax.planning.plan import Plan
from glm_jax.planning.sweep import PlanResult

_GIB = 2**30
_MEMORY = ("weights", "cache", "optimizer", "other", "temporaries", "total", "room")


def line(result: PlanResult) -> str:
    """Describe a plan in one line."""
    request, plan = result.request, result.plan
    remat = "" if request.recipe is None else f" remat {request.recipe.remat}"
    head = f"mesh {','.join(map(str, request.mesh))} batch {request.batch}{remat}: "
    if plan is None:
        return head + result.error
    fits = "fits" if plan.fits else "does not fit"
    return (
        f"{head}{plan.total / _GIB:.1f} of {plan.room / _GIB:.0f} GiB {fits}, "
        f"{1e3 * plan.roofline.seconds:.2f} ms a step ({plan.roofline.limit}), "
        f"{result.rows_per_second:.1f} rows/s"
    )


def table(result: PlanResult, described: ConfigDict) -> str:
    """Describe a plan in several lines: memory, collectives, least time.

    Args:
      described: what the hardware file returns.
    """
    request, plan = result.request, result.plan
    assert plan is not None
    mesh = ",".join(map(str, request.mesh))
    rows = [
        f"{request.job} in {request.precision} on {request.devices} x {described.device_kind}, "
        f"mesh {mesh}, batch {request.batch}, length {request.length}",
        "memory of a device:",
    ]
    rows += [f"  {name:<12}{getattr(plan, name) / _GIB:>10.2f} GiB" for name in _MEMORY]
    if plan.streamed:
        what = "moments and activations" if request.job == "train" else "weights"
        rows.append(f"  {'on its host':<12}{plan.streamed / _GIB:>10.2f} GiB of {what}")
    rows.append("collectives of a step:")
    rows += [
        f"  {kind:<20}{count:>6}{size / 2**20:>10.1f} MiB on a device"
        for kind, (count, size) in by_kind(plan.collectives).items()
    ]
    rows.append("least time of a step:")
    amounts = dataclasses.asdict(plan.work)
    times = dataclasses.asdict(plan.roofline)
    for (amount, value), (name, seconds) in zip(amounts.items(), times.items(), strict=True):
        rows.append(f"  {name:<10}{value:>12.3g} {amount:<14}{1e3 * seconds:>10.3f} ms")
    rows.append(f"lowered in {plan.lowering:.1f} s, compiled in {plan.compiling:.1f} s here")
    rows.append("fits" if plan.fits else "does not fit")
    return "\n".join(rows)


def record(result: PlanResult) -> dict[str, Any]:
    """Return a plan as plain JSON."""
    request, plan = result.request, result.plan
    fields: dict[str, Any] = {
        "job": request.job,
        "precision": request.precision,
        "mesh": list(request.mesh),
        "batch": request.batch,
        "length": request.length,
    }
    if plan is None:
        return fields | {"error": result.error}
    described = dataclasses.asdict(plan)
    return fields | described | {"fits": plan.fits, "seconds": plan.roofline.seconds}


def draw(results: list[PlanResult], path: Path) -> None:
    """Plot a device's memory by kind, a bar for each plan, and a line at the memory's size."""
    figure, axes = pyplot.subplots(
        figsize=(9, 1.5 + 0.4 * len(results)), squeeze=True, layout="constrained"
    )
    requests = [result.request for result in results]
    names = [f"{','.join(map(str, request.mesh))} x {request.batch}" for request in requests]
    plans: list[Plan] = [result.plan for result in results if result.plan is not None]
    ends = [0.0] * len(plans)
    for kind in _MEMORY[:5]:
        sizes = [getattr(plan, kind) / _GIB for plan in plans]
        axes.barh(names, sizes, left=ends, label=kind)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    axes.axvline(plans[0].room / _GIB, color="black")
    axes.set(xlabel="GiB a device", ylabel="mesh x batch")
    axes.invert_yaxis()
    axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    pyplot.close(figure)


@dataclasses.dataclass(frozen=True)
class Table:
    """Plans of many cases, for the documentation.

    Attributes:
      cases: each names a file of configs/hardware as its `hardware`.
      cells: from a case, a model and the hardware to as many cells as there are columns.
    """

    columns: tuple[str, ...]
    cases: tuple[Any, ...]
    cells: Callable[[Any, GLMConfig, ConfigDict], tuple[str, ...]]

    def lines(self, model: GLMConfig, find: Callable[[str], ConfigDict]) -> Iterator[str]:
        """Yield the table in Markdown, a row as soon as it is planned.

        Args:
          find: from a hardware file's name to what the file returns.
        """
        yield markdown_row(self.columns)
        yield "|" + " --- |" * len(self.columns)
        for case in self.cases:
            yield markdown_row(self.cells(case, model, find(case.hardware)))


def markdown_row(cells: tuple[str, ...]) -> str:
    """Format a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
