"""Kernels are checked by a process of their own, and attention takes those that pass."""

import dataclasses
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from glm_jax.config import ConfigError, glm_config
from glm_jax.kernels import self_check, target
from glm_jax.kernels.attention import mosaic_check
from glm_jax.kernels.attention.blockwise import Blockwise
from glm_jax.sharding import make_mesh
from glm_jax.training import step
from glm_jax.training.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("pass", None),
        ("print('a fault'); exit(1)", "its check failed: a fault"),
        ("raise SystemExit(3)", "its check failed: exit status 3"),
        ("raise ValueError('no such')", "its check failed: ValueError: no such"),
        ("import os; os.abort()", "its check failed: exit status -6"),
        ("import time; time.sleep(60)", "its check did not end within 0.5 seconds"),
    ],
)
def test_a_process_tells_what_is_wrong(code, reason):
    seconds = 0.5 if reason and "seconds" in reason else 60.0
    command = [sys.executable, "-S", "-c", code]
    assert self_check.check_apart("", "", command, seconds) == reason


@pytest.mark.parametrize("op", ["attention", "quantized_matmul"])
def test_a_check_ends_with_the_process_that_started_it(op, monkeypatch):
    asked = []
    monkeypatch.setattr(self_check.supervision, "die_with_parent", lambda: asked.append("die"))
    monkeypatch.setattr(self_check, "report", lambda *_: asked.append("check") or 0)
    arguments = {"attention": "bfloat16,64", "quantized_matmul": "[]"}
    monkeypatch.setattr(sys, "argv", ["check", arguments[op]])
    path = f"{self_check.__file__}/../{op}/mosaic_check.py"
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(os.path.normpath(path), run_name="__main__")
    assert (ended.value.code, asked) == (0, ["die", "check"])


def test_a_check_that_hangs_is_killed_with_its_parent():
    code = """
import time
from glm_jax.kernels import self_check
self_check.run(lambda _: print("begun", flush=True) or time.sleep(5) or print("went on"))
"""
    command = ["sh", "-c", '"$@"; :', "sh", sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "begun\n"
        parent.kill()
        assert parent.stdout.read() == ""  # as soon as the child has ended


def test_a_check_whose_parent_ended_before_it_began_does_not_run(monkeypatch):
    command = "from glm_jax.kernels import self_check; self_check.run(lambda _: print('ran') or 0)"
    # By a shell, which is not the process that the variable names.
    apart = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", command]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    reason = self_check.check_apart("", "", apart)
    assert reason == "its check failed: the process that asked for this check has ended"
    assert self_check.check_apart("", "", [sys.executable, "-c", command]) is None


def test_what_passed_is_not_checked_again_with_the_same_kernels(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status = tmp_path / "status"
    (tmp_path / "stub_check.py").write_text(
        f"import sys\nopen({str(tmp_path / 'runs')!r}, 'a').write(sys.argv[1])\n"
        f"print('a fault')\nsys.exit(int(open({str(status)!r}).read()))\n"
    )
    run = lambda argument: self_check.check_apart("stub_check", argument)
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
        status.write_text("1")
        assert run("a") == "its check failed: a fault"
        status.write_text("0")
        assert [run(argument) for argument in "aab"] == [None] * 3
        jax.config.update("jax_enable_compilation_cache", False)  # nor is a program then
        assert run("a") is None
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", None)  # there is nowhere to note it
        assert run("a") is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", before)
    assert (tmp_path / "runs").read_text() == "aabaa"


def _other_version(monkeypatch, package):
    version = self_check.metadata.version
    other = lambda name: "another" if name == package else version(name)
    monkeypatch.setattr(self_check.metadata, "version", other)


def _other_code(monkeypatch, folder):
    package = folder / "glm_jax"
    (package / "quantization").mkdir(parents=True)
    (package / "quantization" / "pack.py").write_text("")
    monkeypatch.setattr(self_check, "_PACKAGE", package)


def _other_driver(monkeypatch, folder):
    (folder / "version").write_text("NVRM version: 1")
    monkeypatch.setattr(self_check, "_DRIVER", folder / "version")


OTHERS = {
    "jax": lambda patch, _: _other_version(patch, "jax"),
    "jaxlib": lambda patch, _: _other_version(patch, "jaxlib"),
    "plugin": lambda patch, _: _other_version(patch, "jax-cuda12-plugin"),
    "flags": lambda patch, _: patch.setenv("XLA_FLAGS", "--xla_another=1"),
    "driver": _other_driver,
    "code": _other_code,
}


@pytest.mark.parametrize("changed", OTHERS)
def test_a_pass_is_of_the_code_the_compilers_and_the_driver(changed, tmp_path, monkeypatch):
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", str(tmp_path))
    note = lambda: self_check._note_of_pass("module", "argument")
    before = note()
    assert before == note()
    OTHERS[changed](monkeypatch, tmp_path)
    assert note() != before


def test_a_folder_that_cannot_be_looked_into_has_no_note(tmp_path, monkeypatch):
    """As one of another user; here by its name's length. The check runs."""
    folder = str(tmp_path / ("a" * 300))
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", folder)
    assert "No module named" in self_check.check_apart("no_such_module", "")
    assert self_check.check_apart("this", "") is None  # which python has


class _Undropped(Blockwise):
    """Wrong where there is dropout."""

    def __call__(self, arguments):
        return super().__call__(arguments.replace(dropout=None))


class _WithoutGradient(Blockwise):
    """Wrong where there is a gradient of values."""

    def __call__(self, arguments):
        value = jax.lax.stop_gradient(arguments.value)
        return super().__call__(arguments.replace(value=value))


@pytest.mark.parametrize(
    ("backend", "fault"),
    [
        (Blockwise(), None),
        (_Undropped(), "output, dropout 0.1: a relative error of "),
        (_WithoutGradient(), "gradient of values, dropout 0.1: a relative error of 1"),
    ],
)
def test_outputs_and_gradients_are_compared(backend, fault):
    got = mosaic_check.first_fault(backend, "float16", 16, rates=[0.1], length=40)
    assert got is None if fault is None else got.startswith(fault)


class _GPU:
    platform, compute_capability = "gpu", "9.0"


def test_a_gpu_of_this_process_is_checked(monkeypatch):
    device = _GPU()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    asked = []
    for has_dropout in (False, True):
        kind = device, "bfloat16", 128, has_dropout
        assert mosaic_check.suits(*kind, check=lambda *x: asked.append(x))
        with pytest.warns(UserWarning, match=r"^attention takes another backend .* slower: why$"):
            assert not mosaic_check.suits(*kind, check=lambda *_: "why")
    assert asked == [("bfloat16", 128)] * 2


def test_a_described_gpu_has_the_kernels_for_dropout():
    assert mosaic_check.suits(_GPU(), "bfloat16", 128, True, check=pytest.fail)
    assert not mosaic_check.suits(_GPU(), "bfloat16", 128, False, check=pytest.fail)


@pytest.mark.parametrize("suits", [False, True])
def test_a_run_has_the_kernels_where_they_suit(monkeypatch, suits):
    monkeypatch.setattr(target, "platform", lambda: "cuda")
    monkeypatch.setattr(target, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(step, "suits", lambda *_: suits)
    recipe, mesh = Recipe(total_samples=8), make_mesh((1, 1, 1))
    config = glm_config("tiny", hidden_size=256, num_heads=2, compute_dtype="bfloat16")
    got = step.with_attention_for(config, recipe, mesh, 2, 256)
    has_kernels = jax.__version_info__ >= (0, 11)
    assert got.attention == ("mosaic" if suits and has_kernels else "auto")
    # Not for heads of this size, whatever the check.
    small = config.replace(num_heads=8)
    assert step.with_attention_for(small, recipe, mesh, 2, 256) == recipe
    named = dataclasses.replace(recipe, attention="mosaic")
    with pytest.raises(ConfigError, match=r"^optimizer\.attention='mosaic': .* heads of 64 or 128"):
        step.with_attention_for(small, named, mesh, 2, 256)
