"""What the GPU suite measured, as tables of docs/performance.md and as a picture."""

from pathlib import Path
from typing import Any

from glm_jax.files import replacing
from launch.suites import gpu_goals

Results = dict[str, Any]

_SHAPE = (12288, 36864)  # of which the history has products
_ROWS, _BATCHES, _PREFILLS = (1, 32, 128, 2048), (1, 8, 32, 64), (128, 1900)
COLUMNS = (
    "card",
    "date",
    "JAX",
    "copy, TB/s",
    "bfloat16 product, TFLOP/s",
    "INT4 product of 12288 x 36864 at 1, 32, 128, 2048 rows, µs",
    "float16, µs",
    "130B INT4: step at batch 1, 8, 32, 64, ms",
    "reading its bytes at batch 1, ms",
    "prefill of 128, 1900 tokens, ms",
    "1B train step, dropout 0, 0.1, ms",
    "torch.compile, ms",
)
_PRODUCT_COLUMNS = ("inputs x outputs", "rows", "INT4", "INT8", "float16", "PyTorch INT4")
_FORMS = ("int4_us", "int8_us", "float16_us", "torch_int4_us")


def history_row(results: Results) -> str:
    """Return the line of the history table; what was not measured is a dash."""
    products = {
        (p["inputs"], p["outputs"], p["rows"]): p for p in results["products"] if "error" not in p
    }
    of_rows = [products.get((*_SHAPE, rows), {}) for rows in _ROWS]
    steps = {step["batch"]: step for step in results["decode"]}
    prefills = {each["prefill"]: each for each in results["prefill"]}
    train = {(t["program"], t["dropout"]): t["ms"] for t in results["train"]}
    model = results.get("model", "130B INT4")
    prefix = "" if model == "130B INT4" else f"{model}: "
    cells = (
        results.get("device", "–"),
        results["date"],
        results.get("jax", "–"),
        _numbers([results["rates"].get("copy_TBps")], 2),
        _numbers([results["rates"].get("bfloat16_TFLOPs")]),
        _numbers([product.get("int4_us") for product in of_rows]),
        _numbers([product.get("float16_us") for product in of_rows]),
        prefix + _numbers([steps.get(batch, {}).get("step_ms") for batch in _BATCHES], 1),
        _numbers([steps.get(1, {}).get("limit_ms")], 1),
        _numbers([prefills.get(tokens, {}).get("ms") for tokens in _PREFILLS]),
        _numbers([train.get(("ours", rate)) for rate in (0.0, 0.1)]),
        _numbers([train.get(("torch.compile", rate)) for rate in (0.0, 0.1)]),
    )
    return _line(cells)


def _numbers(values: list[float | None], digits: int = 0) -> str:
    return ", ".join("–" if value is None else f"{value:.{digits}f}" for value in values)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def header() -> list[str]:
    """Return the first two lines of the history table."""
    return [_line(COLUMNS), _line(["---"] * len(COLUMNS))]


def product_table(results: Results) -> list[str]:
    """Lines of a table of all products, in microseconds."""
    lines = [_line(_PRODUCT_COLUMNS), _line(["---"] * len(_PRODUCT_COLUMNS))]
    ordered = sorted(results["products"], key=lambda p: (-p["inputs"] * p["outputs"], p["rows"]))
    for product in ordered:
        cells = [f"{product['inputs']} x {product['outputs']}", str(product["rows"])]
        lines.append(_line(cells + [_numbers([product.get(form)]) for form in _FORMS]))
    return lines


def page_table(results: Results) -> list[str]:
    """Lines of a table of attention over pages: microseconds, and the memory's rate's share."""
    measured = results.get("pages", [])
    if not measured:
        return []
    names = list(dict.fromkeys(name for each in measured for name in each["us"]))
    lines = [_line(["cache", "heads", *names]), _line(["---"] * (2 + len(names)))]
    for each in measured:
        cells = [_page_cell(each, name) if name in each["us"] else "–" for name in names]
        lines.append(_line([each["cache"], str(each["heads"]), *cells]))
    return ["", "Attention over pages, µs and share of the memory's rate:", "", *lines]


def _page_cell(pages: Results, name: str) -> str:
    wrong = " (wrong)" if gpu_goals.is_wrong(pages, name) else ""
    return f"{pages['us'][name]:.0f}, {100 * pages['share'][name]:.0f}%{wrong}"


def _failures(results: Results) -> list[str]:
    """Return why forms of products and implementations of attention have no times."""
    suffix = "_error"
    products = [
        f"{name.removesuffix(suffix)}: {why}"
        for product in results["products"]
        for name, why in product.items()
        if name.endswith(suffix)
    ]
    attention = [
        f"attention over {each['cache']} pages, {name}: {why}"
        for each in results.get("pages", [])
        for name, why in each["error"].items()
        if name not in each["us"]
    ]
    return list(dict.fromkeys(products + attention))


def markdown(results: Results) -> str:
    """All tables, with what was left out and why."""
    lines = [*header(), history_row(results), "", "Products, µs:", "", *product_table(results)]
    lines += page_table(results)
    if goals := gpu_goals.lines(results):
        lines += ["", "Goals:", "", *(f"    {goal}" for goal in goals)]
    for name, check in results["checks"].items():
        lines += ["", f"Checked: {name}: {check['fault'] or 'right'}"]
    lines += ["", *(f"Warning: {warning}" for warning in results["warnings"])]
    lines += ["", *(f"Failed: {failure}" for failure in _failures(results))]
    lines += ["", *(f"Left out: {name}: {why}" for name, why in results["left_out"].items())]
    return "\n".join(lines).rstrip() + "\n"


def draw(results: Results, path: Path) -> None:
    """Products as times of float16's speed, decode steps beside their limit, train steps."""
    from matplotlib import pyplot

    figure, (products, steps, train) = pyplot.subplots(
        1, 3, figsize=(15, 4.5), layout="constrained"
    )
    shapes = sorted({(p["inputs"], p["outputs"]) for p in results["products"]})
    for inputs, outputs in shapes:
        found = [p for p in results["products"] if (p["inputs"], p["outputs"]) == (inputs, outputs)]
        found = sorted((p for p in found if "int4_us" in p), key=lambda p: p["rows"])
        speeds = [p["float16_us"] / p["int4_us"] for p in found]
        products.plot([p["rows"] for p in found], speeds, "o-", label=f"{inputs} x {outputs}")
    products.axhline(1, color="grey", linewidth=0.8)
    products.set(xscale="log", xlabel="rows", title="INT4: times of float16's speed")
    products.legend(fontsize=7)
    timed = [step for step in results["decode"] if "step_ms" in step]
    names = [f"batch {step['batch']}" for step in timed]
    steps.bar(names, [step["step_ms"] for step in timed], label="step")
    steps.bar(
        names, [step.get("limit_ms", 0) for step in timed], width=0.4, label="reading its bytes"
    )
    steps.set(title=f"{results.get('model', '')}: decode step, ms")
    steps.legend(fontsize=7)
    labels = [f"{t['program']}\ndropout {t['dropout']}" for t in results["train"]]
    train.bar(labels, [t["ms"] for t in results["train"]])
    train.set(title="1B train step, ms")
    figure.suptitle(f"{results.get('device', '')}, {results['date']}, JAX {results.get('jax', '')}")
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    pyplot.close(figure)
