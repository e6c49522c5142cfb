"""Report results: a table, Markdown, a picture beside published numbers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from glm_jax.evaluation.results import RESULTS_FILE, ResultsError, write_results
from glm_jax.evaluation.yaml_files import read_yaml
from glm_jax.files import replacing, write_text

Row = tuple[str, ...]
_HEADER = ("task", "group", "metric", "examples", "max", "median", "average (95%)", "published")


def read_published(path: Path, precision: str | None = None) -> dict[str, dict[str, float]]:
    """Return published numbers: by task, then metric.

    Args:
      precision: "int8" or "int4" for numbers of the model in so many bits, where there are.

    Raises:
      ResultsError: the file is not there or not of this form.
    """
    try:
        content = read_yaml(path)
        of_precision = content.get("precisions", {}).get(precision, {})
        return {
            str(task): {str(name): float(value) for name, value in numbers.items()}
            for task, numbers in (content["tasks"] | of_precision).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(f"{path} holds no published numbers: {error}") from error


def _rows(results: dict[str, Any], published: dict[str, dict[str, float]]) -> Iterator[Row]:
    for task, of_task in results["tasks"].items():
        groups = dict(of_task["groups"])
        if len(groups) > 1:
            groups["all"] = {"summary": of_task["summary"], "examples": of_task["examples"]}
        for group, of_group in groups.items():
            for metric, numbers in of_group["summary"].items():
                known = published.get(task, {}).get(metric)
                interval = _interval(of_group.get("files", {}), metric)
                yield (
                    task,
                    group,
                    metric,
                    str(of_group["examples"]),
                    f"{numbers['max']:.3f}",
                    f"{numbers['median']:.3f}",
                    f"{numbers['average']:.3f}{interval}",
                    "" if known is None else f"{known:g}",
                )


def _interval(files: dict[str, Any], metric: str) -> str:
    """Of a group of one file; several are not resampled together."""
    if len(files) != 1:
        return ""
    [result] = files.values()
    number = result["metrics"][metric]
    if number["low"] is None or number["high"] is None:
        return ""
    return f" ({number['low']:.3f} to {number['high']:.3f})"


def text_table(results: dict[str, Any], published: dict[str, dict[str, float]]) -> str:
    """Return all groups' numbers in columns."""
    return _columns([_HEADER, *_rows(results, published)])


def _columns(rows: Sequence[Row]) -> str:
    """Return rows of cells as text, columns under one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown(results: dict[str, Any], published: dict[str, dict[str, float]]) -> str:
    """Return all groups' numbers as a Markdown table, under what the model is."""
    model = ", ".join(f"{k}={v}" for k, v in results["model"].items() if v is not None)
    rows = [_HEADER, ("---",) * len(_HEADER), *_rows(results, published)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"# Results\n\n{model}\n", *lines, ""])


def draw(results: dict[str, Any], published: dict[str, dict[str, float]], path: Path) -> None:
    """Draw bars of every task's average of its first metric, a mark where one was published."""
    shown = []
    for task, of_task in results["tasks"].items():
        for metric, numbers in list(of_task["summary"].items())[:1]:
            shown.append((task, metric, numbers["average"], published.get(task, {}).get(metric)))
    height = 1.2 + 0.35 * len(shown)
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    places = range(len(shown))
    axes.barh(places, [value for _, _, value, _ in shown], label="measured")
    known = [(i, value) for i, (_, _, _, value) in enumerate(shown) if value is not None]
    if known:
        rows, values = zip(*known, strict=True)
        axes.plot(values, rows, "k|", markersize=14, markeredgewidth=3, label="published")
    axes.set_yticks(places, [f"{task} ({metric})" for task, metric, _, _ in shown])
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, format="png")
    pyplot.close(figure)


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """Return a table of two models' numbers, with the better one where it is significant."""
    rows_of_cells: list[Row] = [("task", "group", "file", "metric", "A", "B", "p", "better")]
    for row in rows:
        p_value = "" if row["p"] is None else f"{row['p']:.3f}"
        numbers = (f"{row['a']:.3f}", f"{row['b']:.3f}", p_value, row["better"])
        rows_of_cells.append((row["task"], row["group"], row["file"], row["metric"], *numbers))
    return _columns(rows_of_cells)


def write_report(
    results: dict[str, Any], published: dict[str, dict[str, float]], folder: Path
) -> None:
    """Write results.json, results.md and results.png."""
    write_results(results, folder / RESULTS_FILE)
    write_text(folder / "results.md", markdown(results, published))
    with replacing(folder / "results.png") as beside:
        draw(results, published, beside)
