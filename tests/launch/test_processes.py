"""Two local processes, started as the templates for clusters start them."""

import os
import sys

import numpy as np
import pytest
import yaml
from running import ROOT, Started, arguments, environment, free_port, losses

from glm_jax import processes
from glm_jax.processes import ProcessesError


@pytest.fixture
def text(tmp_path, corpus):
    (tmp_path / "text.txt").write_text("\n".join(corpus.sentences[:300]), encoding="utf-8")
    return tmp_path


def _in_kubernetes(folder, tokenizer, workdir):
    """The command and environment of the Job's pods, with this machine's values."""
    service, job = yaml.safe_load_all((ROOT / "launch/kubernetes/train.yaml").read_text())
    spec = job["spec"]
    container = spec["template"]["spec"]["containers"][0]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert variables["GLM_JAX_COORDINATOR"] == f"{job['metadata']['name']}-0.{name}:{port}"
    assert spec["template"]["spec"]["subdomain"] == name
    assert int(variables["GLM_JAX_NUM_PROCESSES"]) == spec["completions"] == spec["parallelism"]
    variables["GLM_JAX_COORDINATOR"] = f"127.0.0.1:{free_port()}"
    command = [sys.executable, *container["command"][1:]]
    return [
        Started(
            [*command, *arguments(folder, tokenizer, workdir, "2,2,2")],
            environment(4, **variables, JOB_COMPLETION_INDEX=str(i)),
        )
        for i in range(spec["completions"])
    ]


def _in_slurm(folder, tokenizer, workdir):
    """The batch script, with an srun that starts two tasks here."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.2\n")
    (programs / "srun").write_text(
        '#!/bin/sh\nshift\nSLURM_PROCID=0 "$@" & first=$!\n'
        'SLURM_PROCID=1 "$@" || exit 1\nwait $first\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    script = ["bash", str(ROOT / "launch/slurm/train.sh")]
    variables = environment(
        4,
        PATH=f"{programs}:{os.environ['PATH']}",
        SLURM_NTASKS="2",
        SLURM_JOB_NODELIST="node[1-2]",
        GLM_JAX_PORT=str(free_port()),
        GLM_JAX_PYTHON=sys.executable,
    )
    return [Started([*script, *arguments(folder, tokenizer, workdir, "2,2,2")], variables)]


def test_two_processes_train_as_one_does_and_one_goes_on_from_two(text, tokenizer):
    alone = Started(
        [sys.executable, "-m", "launch.train", *arguments(text, tokenizer, text / "one", "1,1,1")],
        environment(1),
    )
    alone.finish()
    expected = losses(text / "one")
    for process in _in_kubernetes(text, tokenizer, text / "pods"):
        process.finish()
    for process in _in_slurm(text, tokenizer, text / "tasks"):
        process.finish()
    for workdir in (text / "pods", text / "tasks"):
        got = losses(workdir)
        assert list(got) == list(expected)
        np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-3)
        assert (workdir / "model" / "config.json").is_file()


def test_processes_that_cannot_find_each_other_are_told_what_is_missing(monkeypatch):
    for name in ("GLM_JAX_COORDINATOR", "GLM_JAX_NUM_PROCESSES", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    processes.initialize()  # alone
    with pytest.raises(ProcessesError, match="2 processes and no coordinator"):
        processes.initialize(count=2)
    with pytest.raises(ProcessesError, match="GLM_JAX_PROCESS_ID"):
        processes.initialize("127.0.0.1:1", count=2)
    monkeypatch.setenv("GLM_JAX_NUM_PROCESSES", "two")
    with pytest.raises(ProcessesError, match="'two' in the environment is no number"):
        processes.initialize("127.0.0.1:1")
