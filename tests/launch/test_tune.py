"""Measuring products: from candidates to a table, on this CPU, and whatever a candidate does."""

import contextlib
import dataclasses
import json
import time
import types

import jax
import jax.numpy as jnp
import pytest

from glm_jax.config import glm_config
from glm_jax.errors import UserError
from glm_jax.kernels.quantized_matmul import measured, reference
from glm_jax.kernels.quantized_matmul.api import BACKENDS
from glm_jax.kernels.quantized_matmul.arguments import Arguments
from glm_jax.quantization import Scheme
from launch.suites import tuned_products, tuning
from launch.suites.tuned_products import (
    arguments_of,
    cases,
    example,
    linear_shapes,
    measure,
)

REQUEST = tuning.Request("", 60.0, ("random:tiny",), (1,), ("int4,group=32",), (1, 4), 9)


@dataclasses.dataclass(frozen=True)
class Blocks:
    size: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Right with blocks of 3 alone, and slower than with blocks of 4, which are wrong."""

    blocks: Blocks | None = None
    name: str = "kernel"
    platform: str | None = None

    def supports(self, arguments):
        return None if arguments.weight.layout == "stored" else "it takes stored weights"

    def candidates(self, arguments):
        return map(Blocks, (1, 3, 4, 5))

    def __call__(self, arguments):
        size = self.blocks.size
        if size == 1:
            raise NotImplementedError("no such\ntile")
        if size == 4:
            return jnp.zeros((len(arguments.x), arguments.weight.shape[1]))
        product = reference.matmul(arguments.x, arguments.weight)
        # One number of many; and one that is not a number.
        return product.at[0, 7].multiply(jnp.nan) if size == 5 else product


class InLayout(Kernel):
    def supports(self, arguments):
        return None if arguments.weight.layout == "mosaic" else "it takes laid-out weights"


@pytest.fixture
def request_here(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "linear_shapes", lambda config, parallel: [(64, 32)])
    return dataclasses.replace(REQUEST, output=str(tmp_path))


def test_the_fastest_that_is_right_is_what_the_table_and_the_dispatcher_have(
    request_here, tmp_path, monkeypatch, capsys
):
    table = tuning.measure_all(request_here, [Kernel()])
    [one, four] = table.entries.values()
    assert (one.rows, four.rows, one.blocks, one.implementation) == (1, 4, {"size": 3}, "kernel")
    assert one.us > 0 < one.float16_us
    reasons = {(each["rows"], each["blocks"]["size"]): each["reason"] for each in table.left_out}
    assert len(reasons) == 6
    assert reasons[1, 1] == "NotImplementedError: no such tile"
    assert reasons[1, 4].startswith("wrong numbers, off by ")
    assert reasons[1, 5].startswith("wrong numbers, off by nan")
    printed = capsys.readouterr().out
    assert "cpu: 2 products, 0 measured before" in printed
    assert "  left out: kernel size=1: NotImplementedError: no such tile" in printed
    assert "int4 group=32 64 x 32 stored, 4 rows: kernel size=3: " in printed
    assert measured.read(tmp_path / "cpu.json") == table
    # What was measured is not measured again, and what failed is not tried again.
    monkeypatch.setattr(tuning, "measure", lambda *_: 1 / 0)
    assert tuning.measure_all(request_here, [Kernel()]) == table
    monkeypatch.setenv(measured.FOLDER, str(tmp_path))
    arguments = Arguments(jnp.ones((2, 64), "float16"), example(one.product, 0))
    assert measured.preferred([Kernel()], arguments)[0] == Kernel(Blocks(3), platform="cpu")
    assert any("kernel size=3: " in line for line in tuning.report())


def test_a_run_goes_on_where_it_was_and_leaves_out_what_failed(request_here, tmp_path):
    *_, case = request_here.cases(["stored"])
    whole = tuning.measure_all(request_here, [Kernel()])
    entries = {key: entry for key, entry in whole.entries.items() if key[1] != case.rows}
    failed = tuned_products.record_of(case, Kernel(Blocks(3))) | {"reason": "before"}
    part = dataclasses.replace(whole, entries=entries, left_out=(failed,))
    (tmp_path / "cpu.json").write_text(measured.to_text(part))
    resumed = tuning.measure_all(request_here, [Kernel()])
    assert resumed.entries == entries  # all that is right was left out
    assert [each["blocks"]["size"] for each in resumed.left_out] == [3, 1, 4, 5]


def test_no_more_candidates_than_asked_for(request_here):
    request = dataclasses.replace(request_here, rows=(1,), candidates=1)
    table = tuning.measure_all(request, [Kernel()])
    assert [each["blocks"]["size"] for each in table.left_out] == [1]


def test_short_products_are_many_on_a_gpu(monkeypatch):
    case = tuned_products.Case(measured.Product("stored", 4, 64, False, 1024, 1024), 8)
    xs, weights = tuned_products._operands(case, 4, lambda seed: seed)
    assert (len(xs), weights) == (1, list(range(8)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    xs, weights = tuned_products._operands(case, 4, lambda seed: seed)
    assert (len(xs), weights) == (8, list(range(8)))
    assert len({float(x[0, 0]) for x in xs}) == 8
    xs, _ = tuned_products._operands(dataclasses.replace(case, rows=128), 4, lambda seed: seed)
    assert len(xs) == 1


def test_no_product_is_begun_without_time_for_it(request_here, monkeypatch, capsys):
    clock = [0.0]

    def slow(*_):
        clock[0] += 20
        return None, []

    monkeypatch.setattr(tuning, "measure", slow)
    monkeypatch.setattr(tuning, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    tuning.measure_all(dataclasses.replace(request_here, seconds=30.0), [Kernel()])
    assert "no more time: 1 products are left; run it again to go on" in capsys.readouterr().out


def test_a_product_that_there_is_no_memory_for_is_passed_over(
    request_here, tmp_path, monkeypatch, capsys
):
    def measure(case, *_):
        kind = "RESOURCE_EXHAUSTED" if case.rows == 1 else "INTERNAL"
        raise jax.errors.JaxRuntimeError(f"{kind}: of the device")

    monkeypatch.setattr(tuning, "measure", measure)
    (tmp_path / "on_trial").write_text("null")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tuning.measure_all(request_here, [Kernel()])
    assert "64 x 32 stored, 1 row: no memory for it" in capsys.readouterr().out


def test_an_error_of_a_device_is_noted_for_the_first_process(tmp_path):
    path = tmp_path / "on_trial"
    with tuning._trial(path, {"rows": 1}):
        assert tuning._on_trial(path) == {"rows": 1}
    assert tuning._on_trial(path) is None
    with pytest.raises(ValueError, match="invalid"), tuning._trial(path, {"rows": 1}):
        int("x")
    assert tuning._on_trial(path) == {
        "rows": 1,
        "reason": "invalid literal for int() with base 10: 'x'",
    }
    with tuning._trial(path, {"rows": 1}):
        pass
    assert tuning._on_trial(path) is None


@pytest.fixture
def worker(request_here, tmp_path, monkeypatch):
    """What stands in for the process that measures: a script that is given its number."""
    table = tmp_path / "cpu.json"
    table.write_text(measured.to_text(measured.Table("cpu")))
    record = {"device": "cpu", "rows": 1, "implementation": "kernel", "blocks": {"size": 1}}

    def put(script):
        path, count = tmp_path / "program", tmp_path / "count"
        path.write_text(
            f"#!/bin/sh\necho >> {count}; trial={tmp_path}/on_trial\n"
            f"tries() {{ echo '{json.dumps(record)}' > $trial; }}\n"
            f"case $(wc -l < {count}) in\n{script}\nesac\n"
        )
        path.chmod(0o755)
        monkeypatch.setattr(tuning.sys, "executable", str(path))
        return lambda: len(count.read_text().splitlines())

    yield put
    with contextlib.suppress(FileNotFoundError):
        assert not (tmp_path / "on_trial").exists()


def test_a_candidate_that_ends_its_process_or_never_ends_is_left_out(
    worker, request_here, tmp_path, monkeypatch
):
    monkeypatch.setattr(tuning, "_MAX_TRIAL", 0.5)
    monkeypatch.setattr(tuning, "_POLL", 0.02)
    runs = worker("1) tries; kill -9 $$;;\n2) tries; sleep 60;;\n3) sleep 0.6;;")
    tuning.run(request_here)
    assert runs() == 3
    reasons = [each["reason"] for each in measured.read(tmp_path / "cpu.json").left_out]
    assert reasons == ["the process ended with status -9", "it did not end within 0.5 s"]


def test_where_compiling_ends_the_process_each_candidate_is_compiled_alone(
    worker, request_here, tmp_path, monkeypatch
):
    monkeypatch.setattr(tuning, "_POLL", 0.02)
    product = '{"device": "cpu", "rows": 1}'
    runs = worker(
        f"1) echo '{product}' > $trial; kill -6 $$;;\n"
        '2) case "$3" in *\'"one_by_one": true\'*) tries; kill -6 $$;; esac; exit 1;;\n3) ;;'
    )
    tuning.run(request_here)
    assert runs() == 3
    [failure] = measured.read(tmp_path / "cpu.json").left_out
    assert failure["reason"] == "the process ended with status -6"


def test_each_candidate_is_on_trial_while_it_is_compiled_alone(request_here):
    [case, _] = request_here.cases(["stored"])
    tried = []

    @contextlib.contextmanager
    def trial(record):
        tried.append(record.get("blocks"))
        yield

    entry, failures = measure(case, [Kernel()], trial, (), 9, True)
    assert tried == [{"size": n} for n in (1, 3, 4, 5, 3, 4, 5)]
    assert (entry.blocks, len(failures)) == ({"size": 3}, 3)


def test_the_time_is_kept_and_what_was_running_then_is_not_to_blame(
    worker, request_here, tmp_path, monkeypatch
):
    monkeypatch.setattr(tuning, "_POLL", 0.02)
    runs = worker("1) tries; sleep 60;;")
    began = time.monotonic()
    tuning.run(dataclasses.replace(request_here, seconds=0.5))
    assert time.monotonic() - began < 5
    assert runs() == 1
    assert measured.read(tmp_path / "cpu.json").left_out == ()


def test_a_worker_that_fails_otherwise_ends_the_run(worker, request_here):
    runs = worker("1) echo error: a reason >&2; exit 1;;\n2) kill -9 $$;;")
    with pytest.raises(SystemExit, match="1"):
        tuning.run(request_here)
    with pytest.raises(UserError, match="measuring ended with status -9: run it again to go on"):
        tuning.run(request_here)
    assert runs() == 2


def test_linears_are_those_of_the_model_on_each_device():
    assert linear_shapes(glm_config("130b"), 8) == [
        (12288, 4608), (1536, 12288), (12288, 8192), (4096, 12288)
    ]  # fmt: skip
    assert linear_shapes(glm_config("tiny", num_heads=3, hidden_size=96), 2) == []


def test_what_matters_most_comes_first():
    schemes = [Scheme(4), Scheme(4, 64), Scheme(8)]
    found = cases([(192, 64), (64, 64)], schemes, (1, 32), ("mosaic", "stored"))
    firsts = [str(case) for case in found[:7]]
    assert firsts == [
        "int4 192 x 64 mosaic, 1 row", "int4 64 x 64 mosaic, 1 row",
        "int4 192 x 64 mosaic, 32 rows", "int4 64 x 64 mosaic, 32 rows",
        "int4 group=64 192 x 64 mosaic, 1 row", "int4 group=64 192 x 64 mosaic, 32 rows",
        "int8 192 x 64 mosaic, 1 row",
    ]  # fmt: skip
    assert [case.product.layout for case in found].index("stored") == len(found) // 2


def test_a_line_has_what_matters():
    case = tuned_products.Case(measured.Product("mosaic", 4, 64, True, 12288, 1024), 1)
    assert case.weight_bytes == 12288 * 1024 // 2 + 192 * 1024 * 3
    entry = measured.Entry(case.product, 1, "mosaic", {"rows": 8, "raw": True}, 2.5, 10.0)
    assert tuning.line(case, entry) == (
        "int4 group=64 zero_point 12288 x 1024 mosaic, 1 row: mosaic rows=8 raw=1: 2.5 us, "
        "2.75 TB/s of the weight, 4.00 times float16's speed"
    )


def test_groups_that_divide_no_linear_are_refused(request_here):
    request = dataclasses.replace(request_here, quantization=("int4,group=128",))
    with pytest.raises(UserError, match="int4,group=128: no linear of random:tiny divides"):
        tuning.run(request)


def test_examples_are_weights_in_their_layout():
    product = measured.Product("mosaic", 4, 64, True, 128, 64)
    case = tuned_products.Case(product, 3)
    assert measured.Product.of(arguments_of(case).weight) == product
    assert tuned_products.can_be_laid_out(product)
    assert not tuned_products.can_be_laid_out(dataclasses.replace(product, outputs=48))
    # A kernel's own layout is measured where that kernel runs.
    assert tuned_products.layouts_here(BACKENDS) == ("stored",)
    assert tuned_products.layouts_here([InLayout(platform="cpu")]) == ("mosaic", "stored")
