"""Plans for people: a line, a table, JSON, a picture."""

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
from glm_jax.planning.sweep import Tried

_GIB = 2**30
_HELD = ("weights", "cache", "optimizer", "other", "temporaries", "total", "room")


def line(tried: Tried) -> str:
    """One try in one line."""
    asked, plan = tried.question, tried.plan
    head = f"mesh {','.join(map(str, asked.mesh))} batch {asked.batch}: "
    if plan is None:
        return head + tried.error
    fits = "fits" if plan.fits else "does not fit"
    return (
        f"{head}{plan.total / _GIB:.1f} of {plan.room / _GIB:.0f} GiB {fits}, "
        f"{1e3 * plan.roofline.seconds:.2f} ms a step ({plan.roofline.limit}), "
        f"{tried.rows_per_second:.1f} rows/s"
    )


def table(tried: Tried, described: ConfigDict) -> str:
    """What a device holds and does, line by line."""
    asked, plan = tried.question, tried.plan
    assert plan is not None
    rows = [
        f"{asked.job} in {asked.precision} on {asked.devices} x {described.device_kind}, mesh "
        f"{','.join(map(str, asked.mesh))}, batch {asked.batch}, length {asked.length}",
        "a device holds:",
    ]
    rows += [f"  {name:<12}{getattr(plan, name) / _GIB:>10.2f} GiB" for name in _HELD]
    if plan.streamed:
        rows.append(f"  {'on its host':<12}{plan.streamed / _GIB:>10.2f} GiB of weights")
    rows.append("exchanges a step:")
    rows += [
        f"  {kind:<20}{count:>6}{size / 2**20:>10.1f} MiB a device"
        for kind, (count, size) in by_kind(plan.exchanges).items()
    ]
    rows.append("a step at best:")
    amounts = dataclasses.asdict(plan.work)
    times = dataclasses.asdict(plan.roofline)
    for (amount, value), (name, seconds) in zip(amounts.items(), times.items(), strict=True):
        rows.append(f"  {name:<10}{value:>12.3g} {amount:<14}{1e3 * seconds:>10.3f} ms")
    rows.append(f"lowered in {plan.lowering:.1f} s, compiled in {plan.compiling:.1f} s here")
    rows.append("fits" if plan.fits else "does not fit")
    return "\n".join(rows)


def record(tried: Tried) -> dict[str, Any]:
    """A try as plain JSON."""
    asked, plan = tried.question, tried.plan
    fields: dict[str, Any] = {
        "job": asked.job,
        "precision": asked.precision,
        "mesh": list(asked.mesh),
    }
    fields |= {"batch": asked.batch, "length": asked.length}
    if plan is None:
        return fields | {"error": tried.error}
    described = dataclasses.asdict(plan)
    return fields | described | {"fits": plan.fits, "seconds": plan.roofline.seconds}


def draw(found: list[Tried], path: Path) -> None:
    """What a device holds, by kind, a bar for each plan; a line where its memory ends."""
    figure, axes = pyplot.subplots(
        figsize=(9, 1.5 + 0.4 * len(found)), squeeze=True, layout="constrained"
    )
    names = [f"{','.join(map(str, t.question.mesh))} x {t.question.batch}" for t in found]
    plans: list[Plan] = [tried.plan for tried in found if tried.plan is not None]
    ends = [0.0] * len(plans)
    for kind in _HELD[:5]:
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
      cells: of a case, a model and the hardware, as many as there are columns.
    """

    columns: tuple[str, ...]
    cases: tuple[Any, ...]
    cells: Callable[[Any, GLMConfig, ConfigDict], tuple[str, ...]]

    def lines(self, model: GLMConfig, find: Callable[[str], ConfigDict]) -> Iterator[str]:
        """In Markdown, one case after another.

        Args:
          find: from a hardware file's name to what it returns.
        """
        yield markdown_row(self.columns)
        yield "|" + " --- |" * len(self.columns)
        for case in self.cases:
            yield markdown_row(self.cells(case, model, find(case.hardware)))


def markdown_row(cells: tuple[str, ...]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
