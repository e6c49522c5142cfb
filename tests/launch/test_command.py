"""`glm-jax`, and what a wheel brings along for it."""

import runpy
import sys
from pathlib import Path

import pytest
import setuptools
from running import ROOT

from glm_jax.cli import environment
from glm_jax.cli.packaged import packaged
from launch import __main__ as command

NOT_PACKAGED = {".py", ".cc", ".h", ".inc", ".so", ".pyc"}


@pytest.fixture
def run(monkeypatch, capsys):
    """A command line's status and output, and the module that it would run."""

    def run(*arguments):
        ran = []
        monkeypatch.setattr(sys, "argv", ["glm-jax", *arguments])
        monkeypatch.setattr(command.launch, "end_by_interrupt", lambda: None)
        monkeypatch.setattr(runpy, "run_module", lambda name, **_: ran.append((name, sys.argv)))
        status = 0
        try:
            command.main()
        except SystemExit as ended:
            status = ended.code
        return status, ran, *capsys.readouterr()

    return run


def test_every_command_line_has_a_name(run):
    modules = {
        f"{folder}.{path.stem}"
        for folder in ("launch", "convert")
        for path in (ROOT / folder).glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    assert set(command.COMMANDS.values()) == modules - {"launch.__main__"}
    status, _, shown, _ = run("--help")
    assert status == 0
    for name in command.COMMANDS:
        [line] = [line for line in shown.splitlines() if line.startswith(f"  {name} ")]
        assert len(line.split()) > 3


@pytest.mark.parametrize("name", ["merge-adapter", "merge_adapter"])
def test_a_command_runs_its_module_with_the_other_arguments(run, name):
    status, ran, *_ = run(name, "--input=x", "--help")
    assert status == 0
    assert ran == [("convert.merge_adapter", [f"glm-jax {name}", "--input=x", "--help"])]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no command; glm-jax --help lists all"),
        (("genrate",), "unknown command 'genrate'; did you mean generate?"),
        (("sat_to_orbax",), "did you mean convert?"),
        (("--checkpoint=x",), "unknown command '--checkpoint=x'"),
    ],
)
def test_what_is_no_command_is_a_line(run, arguments, words):
    status, ran, _, said = run(*arguments)
    assert (status, ran) == (2, [])
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_version(run):
    status, _, shown, _ = run("--version")
    assert status == 0
    assert shown.split() == ["glm_jax", environment.version().partition(" ")[0]] or (
        environment.version() == "not installed"
    )


def test_a_report_says_what_a_failure_needs(monkeypatch):
    monkeypatch.setenv("GLM_JAX_PORT", "77")
    monkeypatch.setenv("OTHER_SECRET", "hidden")
    lines = list(environment.report("2,2,2"))
    text = "\n".join(lines)
    for name in ("glm_jax", "python", "jax", "jaxlib", "devices", "backend", "memory"):
        assert any(line.startswith(f"{name}: ") for line in lines), name
    assert "devices: 8 x cpu (cpu)" in lines
    assert "mesh: data 2, fsdp 2, tensor 2" in lines
    assert any(line.startswith("kernels' library: ") for line in lines)
    assert "GLM_JAX_PORT=77" in lines
    assert "hidden" not in text
    assert "mesh: mesh (9, 1, 1) needs 9 devices" in "\n".join(environment.report("9,1,1"))


def test_a_report_survives_a_driver_that_does_not(monkeypatch):
    def fail():
        raise RuntimeError("no\ndriver")

    monkeypatch.setattr(environment.jax, "devices", fail)
    lines = list(environment.report(None))
    assert "devices: none, RuntimeError: no driver" in lines
    assert any(line.startswith("memory: ") for line in lines)


def test_files_of_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("configs/train_tiny.py", "configs/tasks", "configs/published.yaml"):
        assert Path(packaged(path)) == ROOT / path
    assert packaged("configs/none.py") == "configs/none.py"
    assert packaged("other/train_tiny.py") == "other/train_tiny.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train_tiny.py").write_text("")
    assert packaged("configs/train_tiny.py") == "configs/train_tiny.py"


def test_a_wheel_brings_all_data_files(monkeypatch):
    """By what setuptools would copy, without building it; tests/slow builds and runs one."""
    monkeypatch.chdir(ROOT)
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **fields: given.update(fields))
    runpy.run_path("setup.py")
    distribution = setuptools.Distribution(given)
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    copied = {
        Path(f"{source}/{name}") for _, source, _, names in build.data_files for name in names
    }
    expected = {
        path.relative_to(ROOT)
        for folder in ("configs", "convert", "glm_jax", "launch")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in NOT_PACKAGED
    }
    assert copied == expected
    assert "glm-jax = launch.__main__:main" in given["entry_points"]["console_scripts"]
