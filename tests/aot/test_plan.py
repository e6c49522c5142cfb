"""The table of hardware, the collectives at 130B size, and plans from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from aot.compiling import hardware

from glm_jax.config import glm_130b
from glm_jax.planning.hardware_table import CASES, plan_case
from glm_jax.planning.plan import PlanRequest, make_plan

ROOT = Path(__file__).parent.parent.parent


# One a compiler and precision; the others are slow, and take no other way.
FIRST = (("a100_40gb", "float16"), ("h200", "int4"), ("tpu_v5p", "bfloat16"))


def _marked(case):
    is_first = (case.hardware, case.precision) in FIRST
    name = f"{case.hardware}-{case.devices}-{case.precision}"
    return pytest.param(case, id=name, marks=() if is_first else pytest.mark.slow)


@pytest.mark.parametrize("case", map(_marked, CASES))
def test_every_case_fits_as_the_table_says(case):
    """The committed table; regenerate it by `python -m launch.plan --table=hardware`."""
    plan = plan_case(case, glm_130b(), hardware(case.hardware))
    assert plan.fits
    text = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    start = f"| {case.devices} x {hardware(case.hardware).device_kind} | {case.precision}"
    [line] = [line for line in text.splitlines() if line.startswith(start)]
    # Bytes are the compiler's, which may change a little with its version.
    printed = float(line.split("=")[1].split("|")[0])
    assert plan.total / 2**30 == pytest.approx(printed, rel=0.03, abs=0.15)
    milliseconds = float(line.split("|")[6].split()[0])
    assert 1e3 * plan.roofline.seconds == pytest.approx(milliseconds, rel=0.02, abs=0.1)


@pytest.mark.parametrize("job", ["decode", "prefill", "evaluate"])
@pytest.mark.parametrize("name", ["a100_40gb", "tpu_v5p"])
def test_two_sums_a_block_and_no_weights(name, job):
    """Tensor parallelism at its floor. Of collectives as large as hidden states there are
    exactly two sums a block and, where tokens are looked up, one; in decoding the scores may
    be gathered. All others together, which choose a token or normalise scores, are smaller
    than one of these."""
    model = glm_130b(num_layers=8)  # 70 take ten times as long and are alike
    plan = make_plan(PlanRequest(model, job, "bfloat16", (1, 1, 8), 1, 2048), hardware(name))
    hidden = (1 if job == "decode" else 2048) * model.hidden_size * 2
    large = [e for e in plan.collectives if e.bytes >= hidden]
    sums = sum(e.times for e in large if e.kind == "all-reduce")
    assert sums == 2 * model.num_layers + (job != "prefill"), large
    gathered = [e for e in large if e.kind != "all-reduce"]
    scores = 4 * model.vocab_size
    assert sum(e.times * e.bytes for e in gathered) in ((0, scores) if job == "decode" else (0,))
    small = sum(e.times * e.bytes for e in plan.collectives if e.bytes < hidden)
    assert small < hidden


@pytest.fixture
def run(tmp_path):
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.plan", "--job=decode", "--hardware=a100-40g"]
    command += ["--config=configs/glm_130b.py", "--precision=float16", f"--output={tmp_path}"]
    return lambda *more: subprocess.run(
        [*command, *more], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600
    )


def test_the_command_line(run, tmp_path):
    fits = run("--devices=8")
    assert fits.returncode == 0, fits.stderr
    assert fits.stdout.rstrip().endswith("\nfits")
    [plan] = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert plan["fits"]
    assert (tmp_path / "plan.png").stat().st_size > 1000
    unknown = run("--hardware=a200")
    assert unknown.returncode == 1
    assert "one of a100_40gb" in unknown.stderr


@pytest.mark.slow
def test_the_command_line_finds_what_fits(run):
    not_here = run("--devices=4", "--length=512")
    assert "does not fit" in not_here.stdout
    assert "smallest that does: 8 x" in not_here.stdout
