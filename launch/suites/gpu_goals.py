"""What the GPU suite measured beside what it is to reach on an H200 or H100, goal by goal."""

from collections.abc import Iterator
from typing import Any

from launch.suites.gpu_parts import MAX_ERROR

Results = dict[str, Any]
Goal = tuple[str, float, str, float]  # what, measured, "<=" or ">=", the goal

_H200_TBPS, _H100_TBPS = 4.3, 3.0  # rates at which they read memory
_FEW_ROWS, _MANY_ROWS = 16, 128
_MICROSECONDS = {  # of a product in 4 bits with few rows, on an H200
    (12288, 36864): 70,
    (12288, 12288): 27,
    (12288, 65536): 125,
    (32768, 12288): 62,
}
_PEAK_TFLOPS = 990
_PAGES = ("library", "mosaic")  # any of them serves


def lines(results: Results) -> list[str]:
    """Return a line for each goal of which both sides were measured."""
    goals = [
        *_of_products(results),
        *_of_pages(results),
        *_of_steps(results),
        *_of_training(results),
    ]
    return [_line(*goal) for goal in goals]


def _line(what: str, measured: float, relation: str, goal: float) -> str:
    is_reached = measured <= goal if relation == "<=" else measured >= goal
    return f"{'reached' if is_reached else 'MISSED '} {what}: {measured:.3g} {relation} {goal:.3g}"


def _slower(results: Results) -> float:
    """By what a time that memory binds is longer than on an H200."""
    return _H200_TBPS / _H100_TBPS if "H100" in results.get("device", "") else 1.0


def _of_products(results: Results) -> Iterator[Goal]:
    rate = results["rates"].get("read_TBps")
    for product in results["products"]:
        inputs, outputs, rows = (product[name] for name in ("inputs", "outputs", "rows"))
        of = f"{inputs} x {outputs}, {rows} row{'s' * (rows > 1)}"
        if "int4_us" not in product or "float16_us" not in product:
            continue  # its error is in the results
        int4, plain = product["int4_us"], product["float16_us"]
        speed = plain / int4
        if rows <= _FEW_ROWS and (inputs, outputs) in _MICROSECONDS:
            goal = _MICROSECONDS[inputs, outputs] * _slower(results)
            yield f"int4 {of}, us", int4, "<=", goal
        elif rows <= _FEW_ROWS and rate is not None:
            read = inputs * outputs / 2 / int4 / 1e6
            yield f"int4 {of}, share of the memory's rate", read / rate, ">=", 0.6
        if rows <= _FEW_ROWS and (inputs, outputs) == (12288, 36864):
            yield f"int4 {of}, times float16's speed", speed, ">=", 3.4
        if rows <= _FEW_ROWS and "int8_us" in product:
            yield f"int8 {of}, us", product["int8_us"], "<=", 0.55 * plain
        if rows == 64:
            yield f"int4 {of}, times float16's speed", speed, ">=", 2.0
        if rows >= _MANY_ROWS:
            yield f"int4 {of}, times float16's speed", speed, ">=", 0.95
            if "int8_us" in product:
                eight = plain / product["int8_us"]
                yield f"int8 {of}, times float16's speed", eight, ">=", 0.95
        if "int4_back_us" in product and "float16_back_us" in product:
            back = product["float16_back_us"] / product["int4_back_us"]
            yield f"int4 {of}, gradient to x, times float16's speed", back, ">=", 0.8


def _of_pages(results: Results) -> Iterator[Goal]:
    for each in results["pages"]:
        shares = {name: each["share"][name] for name in _PAGES if name in each["share"]}
        wrong = [name for name in shares if is_wrong(each, name)]
        if shares:
            what = f"attention over {each['cache']} pages, {each['heads']} heads"
            what += f" ({', '.join(wrong)} wrong)" if wrong else ""
            right = [share for name, share in shares.items() if name not in wrong]
            yield f"{what}, share of the memory's rate", max(right, default=0.0), ">=", 0.75


def is_wrong(pages: Results, name: str) -> bool:
    """Return whether an implementation's attention over pages has wrong numbers."""
    return not pages["error"][name] <= MAX_ERROR  # of NaN, too


def _of_steps(results: Results) -> Iterator[Goal]:
    model, slower = results.get("model"), _slower(results)
    if model != "130B INT4":
        return
    for step in results["decode"]:
        batch, milliseconds = step["batch"], step.get("step_ms")
        if milliseconds is not None and batch == 1:
            yield f"{model}, batch 1, ms", milliseconds, "<=", 18.5 * slower
        if milliseconds is not None and batch in (32, 64):
            goal = {32: 1100, 64: 1600}[batch] / slower
            yield f"{model}, batch {batch}, tokens/s", 1e3 * batch / milliseconds, ">=", goal
    for prefill in results["prefill"]:
        if prefill["prefill"] == 1900:
            yield f"{model}, prefill of 1900 tokens, ms", prefill["ms"], "<=", 800


def _of_training(results: Results) -> Iterator[Goal]:
    steps = {(step["program"], step["dropout"]): step for step in results["train"]}
    for dropout, speed, share in ((0.0, 1.05, 0.5), (0.1, 0.95, 0.45)):
        ours, peer = (steps.get((name, dropout)) for name in ("ours", "torch.compile"))
        what = f"1B train step, dropout {dropout}"
        if ours is not None and "TFLOPs" in ours:
            yield (
                f"{what}, share of {_PEAK_TFLOPS} TFLOP/s",
                ours["TFLOPs"] / _PEAK_TFLOPS,
                ">=",
                share,
            )
        if ours is not None and peer is not None:
            yield f"{what}, times torch.compile's speed", peer["ms"] / ours["ms"], ">=", speed
            if dropout == 0.0:
                yield f"{what}, peak memory, GB", ours["peak_GB"], "<=", peer["peak_GB"]
