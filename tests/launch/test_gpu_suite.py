"""The GPU suite in a small form: its parts on this CPU, and what becomes of their results."""

import dataclasses
import json
from pathlib import Path

import pytest

from glm_jax.errors import UserError
from launch.suites import gpu, gpu_parts, gpu_report, mosaic

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


def test_products_of_weights_laid_out_for_mosaic():
    shapes = dataclasses.replace(gpu_parts.SHAPES["tiny"], rows=(1,))
    (line,) = mosaic.mosaic_products(shapes, every=True, bits=(4,))
    assert list(line["us"]) == ["float16", "default", "mosaic"]  # others where there is a GPU
    assert line["error"] < 1e-3


def test_attention_over_pages(tmp_path):
    _, *lines = _measured(tmp_path, "pages")
    assert [line["cache"] for line in lines] == ["float16", "int8"]
    for line in lines:
        assert line["us"]["xla"] > 0 < line["share"]["xla"]
        assert "it runs on cuda" in line["error"]["mosaic"]
    results = {"left_out": {}, "date": "", "rates": {}, "products": [], "pages": []}
    for line in lines:
        gpu._add(results, line)
    assert gpu_report.page_table(results)[5].startswith("| float16 | 2 | ")


def test_decode_steps_of_random_weights(tmp_path):
    arguments = "decode", "--checkpoint=random:tiny", "--quantization=int4"
    _, made, step, prefill = _measured(tmp_path, *arguments)
    assert made["model"] == "TINY INT4"
    assert step["batch"] == 1
    assert step["step_ms"] > 0 < step["limit_ms"]
    assert prefill["prefill"] == 8


def test_a_train_step(tmp_path):
    *_, step = _measured(tmp_path, "train", "--dropout=0.1")
    assert (step["program"], step["dropout"]) == ("ours", 0.1)
    assert step["ms"] > 0


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
    lines, failure = gpu._run_part(["rates"], {}, 0.5)
    assert lines == [{"copy_TBps": 3.0}]
    assert failure == "no more time after 0 s"


def test_a_part_that_fails_is_named_and_the_others_go_on(program):
    program("""case "$3" in
      decode) echo out of memory >&2; exit 1;;
      rates) echo '{"device": "card", "jax": "1"}' >> $out; echo '{"copy_TBps": 3.0}' >> $out;;
      train) echo '{"program": "ours", "dropout": 0.0, "ms": 5.0}' >> $out;;
    esac""")
    results = gpu.measure(["torch"], "tiny", "random:tiny", "int4")
    assert results["left_out"] == {
        "torch": "skipped",
        "decode --checkpoint=random:tiny --quantization=int4": "out of memory",
    }
    assert results["rates"] == {"copy_TBps": 3.0}
    assert len(results["train"]) == 2
    assert "| card |" in gpu_report.history_row(results)
    program("echo --suite=gpu needs a GPU; exit 1")
    with pytest.raises(UserError, match="needs a GPU"):
        gpu.measure([], "full", "random:130b", "int4")


def test_the_page_begins_with_what_was_measured_first(tmp_path):
    """Regenerate a line from its JSON by `gpu_report.history_row`."""
    lines = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(gpu_report.header()[0])
    assert lines[start : start + 3] == [*gpu_report.header(), gpu_report.history_row(FIRST)]
    for line in gpu_report.product_table(FIRST):
        assert line in lines
    gpu_report.draw(FIRST, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000
