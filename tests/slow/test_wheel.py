"""A wheel that is built, installed beside nothing of the checkout, and used from another folder."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from running import ROOT, environment


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The command `glm-jax` of an environment that borrows only the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    source = folder / "source"  # a build leaves files behind
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", *options, str(source)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = folder / "env" / "lib" / version / "site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    [wheel] = folder.glob("*.whl")
    subprocess.run(
        [*pip, f"--python={python}", "install", "--no-deps", "--no-index", wheel], check=True
    )
    return python.with_name("glm-jax"), site


def test_it_works_from_any_folder(installed, tmp_path):
    command, site = installed
    variables = environment(1)
    del variables["PYTHONPATH"]

    def run(*arguments):
        done = subprocess.run(
            [command, *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "Commands:" in run("--help")
    assert run("--version").startswith("glm_jax ")
    report = run("env")
    assert f"{site}/glm_jax" in report
    assert "kernels' library: " in report
    assert "does not load" not in report
    assert "--config.data.batch_size" in run("train", "--help")
    (tmp_path / "dev.tsv").write_text("gj04\t1\t\tThe sailors rode the breeze.\n")
    run("prepare-task", "--dataset=glue_cola", "--input=dev.tsv", "--output=data")
    task = "--task=configs/tasks/bloom/glue_cola.yaml"
    checked = run("evaluate", "--checkpoint=random:tiny", task, "--data=data", "--check")
    assert "1 tasks: all data can be used" in checked
    (tmp_path / "prompts.txt").write_text("Paris is in [MASK].\n")
    filled = run("generate", "--checkpoint=random:tiny", "--input=prompts.txt", "--max_length=32")
    assert filled.startswith("Paris is in")
    for file in ("launch/slurm/train.sh", "configs/chat/dialogue.jinja"):
        assert Path(os.fspath(site), file).is_file(), file
