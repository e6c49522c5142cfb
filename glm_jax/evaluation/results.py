"""Make results of records, by file, group and task, with intervals; compare two models."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.errors import UserError
from glm_jax.evaluation.metrics import (
    HIGHER_IS_WORSE,
    Measured,
    Metric,
    Statistics,
    measure,
    resampled,
)
from glm_jax.files import write_text
from glm_jax.text_files import TextFileError, read_json

RESULTS_FILE = "results.json"
SIGNIFICANT = 0.05


class ResultsError(UserError):
    """A results file that cannot be used."""


def file_results(
    metrics: dict[str, Metric], predictions: list[Any], examples: list[Any], tokenizer: Any
) -> dict[str, Any]:
    """Return every number of a data file, with its interval, and its units' values.

    A metric of several numbers gives "METRIC/NAME" for each.
    """
    measured, units = {}, {}
    for name, metric in metrics.items():
        statistics = metric(predictions, examples, tokenizer)
        for part, number in measure(statistics).items():
            measured[f"{name}/{part}" if part else name] = _plain(number)
        units[name] = unit_values(statistics)
    return {"examples": len(examples), "metrics": measured, "units": units}


def unit_values(statistics: Statistics) -> list[float | None]:
    """Return the metric's first number for each unit alone; None if it has none."""
    first = next(iter(statistics.finish(statistics.values.sum(axis=0))))
    values: list[float | None] = []
    for row in statistics.values:
        try:
            value = statistics.finish(row)[first]
        except (ZeroDivisionError, ValueError):
            value = math.nan
        values.append(round(value, 6) if math.isfinite(value) else None)
    return values


def _plain(number: Measured) -> dict[str, float | None]:
    values = {"value": number.value, "low": number.low, "high": number.high}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def group_results(files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the maximum, median and example-weighted mean of each number over a group's files."""
    names = dict.fromkeys(name for result in files.values() for name in result["metrics"])
    summary = {}
    for name in names:
        pairs = [
            (result["metrics"][name]["value"], result["examples"])
            for result in files.values()
            if result["metrics"].get(name, {}).get("value") is not None
        ]
        if pairs:
            values, weights = zip(*pairs, strict=True)
            summary[name] = {
                "max": max(values),
                "median": float(np.median(values)),
                "average": float(np.average(values, weights=weights)),
            }
    examples = sum(result["examples"] for result in files.values())
    return {"files": files, "examples": examples, "summary": summary}


def task_results(groups: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return results of a task: of its groups, and of all their files together."""
    everything = {
        f"{group}/{name}": result
        for group, files in groups.items()
        for name, result in files.items()
    }
    return {
        "groups": {group: group_results(files) for group, files in groups.items()},
        "summary": group_results(everything)["summary"],
        "examples": sum(result["examples"] for result in everything.values()),
    }


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write the whole file, or nothing."""
    text = json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_text(path, text)


def read_results(path: Path) -> dict[str, Any]:
    """Read what `write_results` wrote.

    Raises:
      ResultsError: it is not there or something else.
    """
    try:
        results: dict[str, Any] = read_json(path)
    except TextFileError as error:
        raise ResultsError(f"no results.json: {error}") from error
    if not _is_results(results):
        raise ResultsError(f"{path} is no results.json: not what evaluations write")
    return results


def _is_results(results: Any) -> bool:
    """Return whether results have everything that `compare` reads."""
    try:
        files = [
            file
            for task in results["tasks"].values()
            for group in task["groups"].values()
            for file in group["files"].values()
        ]
        numbers = [number["value"] for file in files for number in file["metrics"].values()]
        units = [x for file in files for values in file["units"].values() for x in values]
    except (KeyError, TypeError, AttributeError):
        return False
    kinds = (int, float, type(None))
    return all(isinstance(x, kinds) for x in (*numbers, *units))


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Return two models' numbers on every file that both answered.

    The p-value is that of the mean difference of units, both models' drawn together (a paired
    bootstrap); where the files have other units, there is none.
    """
    rows = []
    for task, of_a in a["tasks"].items():
        for group, group_a in of_a["groups"].items():
            group_b = b["tasks"].get(task, {}).get("groups", {}).get(group, {"files": {}})
            for name, file_a in group_a["files"].items():
                file_b = group_b["files"].get(name)
                if file_b is not None:
                    where = {"task": task, "group": group, "file": name}
                    rows += [where | row for row in _compare_file(file_a, file_b)]
    return rows


def _compare_file(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for metric, number in a["metrics"].items():
        other = b["metrics"].get(metric)
        if other is None or number["value"] is None or other["value"] is None:
            continue
        base = metric.split("/")[0]
        p_value = None
        if metric == base:
            p_value = paired_p_value(a["units"].get(base, []), b["units"].get(base, []))
        rows.append(
            {
                "metric": metric,
                "a": number["value"],
                "b": other["value"],
                "p": p_value,
                "better": _better(base, number["value"], other["value"], p_value),
            }
        )
    return rows


def _better(metric: str, a: float, b: float, p_value: float | None) -> str:
    if p_value is None or p_value >= SIGNIFICANT or a == b:
        return ""
    return "A" if (a > b) != (metric in HIGHER_IS_WORSE) else "B"


def paired_p_value(a: list[float | None], b: list[float | None]) -> float | None:
    """Return the two-sided p-value of the mean difference of units."""
    if len(a) != len(b) or not a:
        return None
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs:
        return None
    differences = np.array([x - y for x, y in pairs])
    if not differences.any():
        return 1.0
    means = resampled(differences[:, None], 0)[:, 0] / len(differences)
    tail = min(float((means <= 0).mean()), float((means >= 0).mean()))
    return min(1.0, max(2 * tail, 1 / len(means)))
