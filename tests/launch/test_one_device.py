"""`make test-gpu` leaves out what lacks a package or devices, says so, and nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Of the environment in which the project met its first GPU.
MISSING = """ml_collections grain array_record tensorboardX zstandard tokamax qwix beartype
einshape immutabledict pydantic pydantic_core typeguard annotated_types typing_inspection
portpicker"""
TESTS = """
import pytest
from glm_jax.sharding import make_mesh
pytestmark = pytest.mark.gpu

def test_runs():
    import launch.benchmark  # the GPU suite

def test_other_packages():
    import configs.hardware.h200

def test_devices():
    make_mesh((1, 1, 8))

def test_fails():
    import glm_jax.nowhere

@pytest.fixture
def made():
    import zstandard

def test_fixture(made):
    pass
"""


def _run(folder, platforms, *options):
    blocked = f"import sys; sys.modules.update(dict.fromkeys({MISSING.split()}))"
    code = f"{blocked}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["-q", "-p", "one_device", "-p", "no:cacheprovider", "-m", "gpu", "-rs", *options]
    variables = os.environ | {"GLM_JAX_TEST_PLATFORMS": platforms}
    variables["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments, str(folder), f"--rootdir={folder}"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_reasons(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_whole_file.py").write_text("import grain\n\ndef test_one():\n    pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    result = _run(tmp_path, "cpu")
    assert re.search(r"not installed, so that .* left out: .*grain.*zstandard", result.stdout)
    assert "needs grain, which is not installed" in result.stdout
    assert "needs ml_collections, which is not installed" in result.stdout
    assert "needs zstandard, which is not installed" in result.stdout
    assert "needs 8 devices, there are 1" in result.stdout
    assert "1 failed, 1 passed, 4 skipped" in result.stdout
    assert "No module named 'glm_jax.nowhere'" in result.stdout


def test_without_a_gpu_it_is_one_line(tmp_path):
    result = _run(tmp_path, "cuda,cpu")
    assert result.returncode == 1
    assert "make test-gpu needs a GPU that JAX can use" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.slow
def test_a_test_that_does_not_end_costs_the_others_nothing(tmp_path):
    """But its own other parameters, which fail at once."""
    (tmp_path / "test_some.py").write_text("""
import time, pytest, one_device
one_device.SECONDS = 0.5
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("n", [0, 1])
def test_hangs(n):
    time.sleep(60)

def test_ends():
    pass
""")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    result = _run(tmp_path, "cpu", "-n", "1")
    assert re.search(r"1 failed, 1 passed, 1 error", result.stdout), result.stdout
    assert "crashed while running 'test_some.py::test_hangs[0]'" in result.stdout
    assert "with other parameters it ended its process, or did not end in time" in result.stdout
