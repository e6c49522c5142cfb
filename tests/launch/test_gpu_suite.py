"""The GPU suite in a small form: its parts on this CPU, and what becomes of their results."""

import dataclasses
import itertools
import json
import warnings
import weakref
from pathlib import Path

import pytest

from glm_jax.errors import UserError
from launch.suites import gpu, gpu_goals, gpu_parts, gpu_products, gpu_report, pages

_GPU_CACHE, _READ_RATE = 60e6, 4.3e12  # an H200's, in bytes and bytes a second
TINY = gpu_parts.SHAPES["tiny"]
ROOT = Path(__file__).parent.parent.parent
FIRST = json.loads((ROOT / "docs" / "performance" / "h200-2026-11-26.json").read_text())


def _measured(tmp_path, *arguments):
    output = tmp_path / "results.jsonl"
    gpu_parts.main([*arguments, "--shapes=tiny", f"--output={output}"])
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_rates_and_products(tmp_path):
    about, *rates = _measured(tmp_path, "rates")
    assert about["platform"] == "cpu"
    assert [list(rate) for rate in rates] == [["read_TBps"], ["copy_TBps"], ["bfloat16_TFLOPs"]]
    products = [line for line in _measured(tmp_path, "products") if "rows" in line]
    assert [product["rows"] for product in products] == [1, 16]
    assert products[0]["int8_us"] > 0
    assert all(p["int4_us"] > 0 and p["float16_us"] > 0 for p in products)
    assert products[1]["int4_back_us"] > 0 < products[1]["float16_back_us"]


@pytest.mark.parametrize(("variable", "expected"), [("", "mosaic"), ("stored", "stored")])
def test_products_are_of_weights_as_a_model_has_them_on_the_device(monkeypatch, variable, expected):
    monkeypatch.setenv("GLM_JAX_QUANTIZED_LAYOUT", variable)
    monkeypatch.setattr(gpu_products.mosaic_check, "is_for", lambda device: True)
    gpu_products._weights.cache_clear()
    assert gpu_products._weight("int4", 128, 64, 0).layout == expected
    assert gpu_products._weight("float16", 128, 64, 0).dtype == "float16"
    [line, _] = gpu_products.products(dataclasses.replace(TINY, rows=(1, 2), products=((128, 64),)))
    assert line["layout"] == expected


def test_attention_over_pages(tmp_path):
    _, *lines = _measured(tmp_path, "pages")
    # Ours last: one that never ends loses nothing else.
    assert [list(line["error"]) for line in lines] == [["library"]] * 2 + [["xla"]] * 2 + [
        ["mosaic"]
    ] * 2
    results = {"pages": [], "products": []}
    for line in lines:
        gpu._add(results, line)
    assert [each["cache"] for each in results["pages"]] == ["float16", "int8"]
    for each in results["pages"]:
        assert each["us"]["xla"] > 0 < each["share"]["xla"]
        assert each["error"]["xla"] < gpu_parts.MAX_ERROR
        assert "it runs on cuda" in each["error"]["mosaic"]
    assert gpu_report.page_table(results)[5].startswith("| float16 | 2 | ")
    failures = gpu_report._failures(results)
    assert len(failures) == 4
    assert failures[0].startswith("attention over float16 pages, library: BackendError: ")


def test_attention_over_pages_is_of_more_than_a_gpus_cache_and_longer_than_a_start(monkeypatch):
    monkeypatch.setattr(gpu_parts.jax, "default_backend", lambda: "gpu")
    shapes = gpu_parts.SHAPES["full"]
    for heads, cache in itertools.product(shapes.heads, ("float16", "int8")):
        case = pages.PagesCase(shapes, heads, cache)
        assert case.copies * case.read_bytes >= 5 * _GPU_CACHE
        assert case.turns * case.copies * case.read_bytes / _READ_RATE >= 300e-6
    assert pages.PagesCase(shapes, 12, "float16").read_bytes == 2 * 12 * 128 * 2 * 32 * 512


def test_attention_over_pages_is_by_the_number_of_a_program(monkeypatch):
    """Several queries over several caches: a result each, and a time of all."""
    monkeypatch.setattr(pages, "turns_of", lambda rows, size: 3)
    case = pages.PagesCase(dataclasses.replace(TINY, in_turn=1 << 20), 2, "int8")
    assert case.copies > 1
    results = case.program("xla")(*case.operands)
    assert len(results) == 3 * case.copies
    assert pages.error_of(results[0], case.expected) < 1e-3
    assert pages.error_of(results[-1], case.expected) > 0.1
    monkeypatch.setattr(pages, "interleaved", lambda runs: dict.fromkeys(runs, 30.0 * case.copies))
    found = pages._measured(case, "xla", lambda: case.program("xla"), 1.0)
    assert found["us"] == {"xla": 1e6 * 30 / (3 * gpu_parts.REPEATS)}


def test_a_result_is_dropped_before_the_next_run():
    """So that it has the same memory."""
    alive, runs = [], []

    class Output(list):
        pass

    def run():
        alive.append(sum(reference() is not None for reference in runs))
        output = Output()
        runs.append(weakref.ref(output))
        return output

    last = gpu_parts.often(run)()
    assert alive == [0] * gpu_parts.REPEATS
    assert last is runs[-1]()


def test_what_fails_among_products_is_named_and_the_others_go_on(monkeypatch):
    def unknown(*_):
        raise AttributeError("no int4\nhere")

    monkeypatch.setattr(gpu_products, "_has_torch", lambda: True)
    monkeypatch.setattr(gpu_products, "_torch_run", unknown)
    monkeypatch.setattr(gpu_products, "quantized_matmul", unknown)
    shapes = dataclasses.replace(TINY, rows=(1,), int8_rows=())
    [line] = gpu_products.products(shapes)
    reason = "AttributeError: no int4 here"
    assert line["torch_int4_error"] == line["int4_error"] == reason
    assert line["float16_us"] > 0
    assert "int4_us" not in line
    results = {"products": [line], "rates": {}}
    assert gpu_report._failures(results) == [f"{form}: {reason}" for form in ("int4", "torch_int4")]
    assert list(gpu_goals._of_products(results)) == []


def test_decode_steps_of_random_weights(tmp_path):
    arguments = "decode", "--checkpoint=random:tiny", "--quantization=int4"
    _, made, step, prefill = _measured(tmp_path, *arguments)
    assert made["model"] == "TINY INT4"
    assert step["batch"] == 1
    assert step["step_ms"] > 0 < step["limit_ms"]
    assert prefill["prefill"] == 8


def test_steps_are_of_weights_laid_out_though_there_is_no_room_for_both_forms(monkeypatch):
    """As the 130B's on one GPU."""
    asked = []
    prepared = lambda params, donate: asked.append(donate) or params
    monkeypatch.setattr(gpu_parts, "prepare", prepared)
    next(gpu_parts.decode(TINY, "random:tiny", "int4"))
    assert asked == [True]


def test_a_train_step(tmp_path):
    arguments = "train", "--dropout=0.1", "--attention=blockwise"
    *_, step = _measured(tmp_path, *arguments)
    assert (step["program"], step["dropout"]) == ("ours", 0.1)
    assert step["ms"] > 0 < step["TFLOPs"]


def test_a_warning_is_a_result(tmp_path, monkeypatch):
    def rates(shapes):
        warnings.warn("another kernel", stacklevel=1)
        yield {"copy_TBps": 3.0}

    monkeypatch.setattr(gpu_parts, "rates", rates)
    assert {"warning": "another kernel"} in _measured(tmp_path, "rates")


def test_full_sizes_are_refused_without_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu_parts.main(["rates", f"--output={tmp_path / 'none'}"])


@pytest.fixture
def program(tmp_path, monkeypatch):
    """What stands in for Python in the processes of parts: writes to --output=..., and more."""

    def put(script):
        path = tmp_path / "program"
        path.write_text(f'#!/bin/sh\nfor last; do :; done\nout="${{last#--output=}}"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setattr(gpu.sys, "executable", str(path))

    return put


def test_a_part_without_time_has_what_it_reached(program, monkeypatch):
    program("""echo '{"copy_TBps": 3.0}' >> $out; printf '{"read' >> $out; sleep 60""")
    lines = []
    failure = gpu._run_part(["rates"], {}, 0.5, lines.append)
    assert lines == [{"copy_TBps": 3.0}]
    assert failure == "no more time after 0 s"


def test_a_part_that_fails_is_named_and_the_others_go_on(program):
    program("""case "$3" in
      decode) echo out of memory >&2; exit 1;;
      rates) echo '{"device": "card", "jax": "1"}' >> $out; echo '{"copy_TBps": 3.0}' >> $out;;
      train) echo '{"program": "ours", "dropout": 0.0, "ms": 5.0}' >> $out;;
    esac""")
    saved = []
    arguments = ["torch"], "tiny", "random:tiny", "int4"
    results = gpu.measure(*arguments, lambda results: saved.append(json.dumps(results)))
    assert results["left_out"] == {
        "torch": "skipped",
        "decode --checkpoint=random:tiny --quantization=int4": "out of memory",
    }
    assert results["rates"] == {"copy_TBps": 3.0}
    assert len(results["train"]) == 2
    assert '"copy_TBps": 3.0' in saved[1]  # as soon as it is there
    assert saved[-1] == json.dumps(results)
    assert "| card |" in gpu_report.history_row(results)
    program("echo --suite=gpu needs a GPU; exit 1")
    with pytest.raises(UserError, match="needs a GPU"):
        gpu.measure([], "full", "random:130b", "int4")


@pytest.mark.parametrize(
    ("name", "layout", "attention"),
    [("attention in bfloat16", "", "--attention=blockwise"), ("products in 4 bits", "stored", "")],
)
def test_a_kernel_that_hung_is_not_tried_again(program, tmp_path, name, layout, attention):
    program(f"""echo "$GLM_JAX_QUANTIZED_LAYOUT $*" >> {tmp_path}/calls
    case "$3" in
      checks) echo '{{"check": "{name}", "fault": "it has not ended"}}' >> $out; exit 1;;
    esac""")
    gpu.measure(["torch", "rates"], "tiny", "random:tiny", "int4")
    calls = (tmp_path / "calls").read_text().splitlines()
    by_part = {call.split(" -m launch.suites.gpu_parts ")[1].split()[0]: call for call in calls}
    assert by_part["decode"].split(" ")[0] == by_part["products"].split(" ")[0] == layout
    assert attention in by_part["train"]
    assert ("--attention" in by_part["train"]) == bool(attention)


def test_parts_fit_into_nine_minutes_and_share_the_device(program, tmp_path):
    """PyTorch too beside what JAX takes at once; a step that trains is compiled within a minute."""
    assert sum(gpu.PARTS.values()) <= 540
    assert gpu.PARTS["train"] / 2 >= 60
    program(f'echo "$3 $XLA_PYTHON_CLIENT_PREALLOCATE" >> {tmp_path}/calls')
    gpu.measure(["decode", "train"], "tiny", "random:tiny", "int4")
    calls = (tmp_path / "calls").read_text().splitlines()
    for part in ("checks", "torch_train", "products"):
        assert f"{part} false" in calls
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (0.001, "reached attention over int8 pages, 96 heads, share of the memory's rate: 0.8"),
        (0.5, "MISSED  attention over int8 pages, 96 heads (mosaic wrong), share of the memory's "),
        (float("nan"), "MISSED  attention over int8 pages, 96 heads (mosaic wrong), share of"),
    ],
)
def test_wrong_numbers_reach_no_goal(error, line):
    measured = {"cache": "int8", "heads": 96, "share": {"library": 0.3, "mosaic": 0.8}}
    measured |= {"error": {"library": 0.002, "mosaic": error}, "us": {"library": 9, "mosaic": 3}}
    [goal] = gpu_goals._of_pages({"pages": [measured]})
    assert gpu_goals._line(*goal).startswith(line)
    table = gpu_report.page_table({"pages": [measured]})
    assert ("(wrong)" in table[-1]) == (error != 0.001)


def test_goals_are_named_one_by_one():
    product = {"inputs": 12288, "outputs": 36864, "rows": 1, "int4_us": 90.0, "float16_us": 240.0}
    back = {"int4_back_us": 10.0, "float16_back_us": 9.0}
    train = [
        {"program": name, "dropout": 0.1, "ms": ms, "peak_GB": 1.0, "TFLOPs": 500.0}
        for name, ms in (("ours", 300.0), ("torch.compile", 200.0))
    ]
    page = {"cache": "int8", "heads": 96, "share": {"library": 0.3, "mosaic": 0.8}}
    page["error"] = {"library": 0.0, "mosaic": 0.0}
    results = {
        "device": "NVIDIA H100 80GB HBM3",
        "model": "130B INT4",
        "rates": {"read_TBps": 3.0},
        "products": [product, product | {"rows": 2048} | back],
        "pages": [page],
        "decode": [{"batch": 1, "step_ms": 30.0}, {"batch": 32, "error": "no memory"}],
        "prefill": [{"prefill": 1900, "ms": 700.0}],
        "train": train,
    }
    assert gpu_goals.lines(results) == [
        "reached int4 12288 x 36864, 1 row, us: 90 <= 100",
        "MISSED  int4 12288 x 36864, 1 row, times float16's speed: 2.67 >= 3.4",
        "reached int4 12288 x 36864, 2048 rows, times float16's speed: 2.67 >= 0.95",
        "reached int4 12288 x 36864, 2048 rows, gradient to x, times float16's speed: 0.9 >= 0.8",
        "reached attention over int8 pages, 96 heads, share of the memory's rate: 0.8 >= 0.75",
        "MISSED  130B INT4, batch 1, ms: 30 <= 26.5",
        "reached 130B INT4, prefill of 1900 tokens, ms: 700 <= 800",
        "reached 1B train step, dropout 0.1, share of 990 TFLOP/s: 0.505 >= 0.45",
        "MISSED  1B train step, dropout 0.1, times torch.compile's speed: 0.667 >= 0.95",
    ]


def test_the_page_begins_with_what_was_measured_first(tmp_path):
    """Regenerate a line from its JSON by `gpu_report.history_row`."""
    lines = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(gpu_report.header()[0])
    assert lines[start : start + 3] == [*gpu_report.header(), gpu_report.history_row(FIRST)]
    for line in gpu_report.product_table(FIRST):
        assert line in lines
    gpu_report.draw(FIRST, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000
