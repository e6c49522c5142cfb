"""Training runs in processes of their own."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import jax
import yaml

from glm_jax.checkpoints.model_folder import save_model
from glm_jax.config import glm_config
from glm_jax.model import params as glm_params
from glm_jax.training import metrics

ROOT = Path(__file__).parent.parent
_HANGS = 900  # seconds: no run here takes nearly as long, on whatever machine
_SMALL = (
    "--config.model.vocab_size=4096",
    "--config.model.hidden_size=32",
    "--config.model.inner_hidden_size=64",
    "--config.data.sequence_length=48",
    "--config.data.batch_size=8",
    "--config.steps=12",
    "--config.log_every=1",
    "--config.checkpoint_every=5",
)


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def arguments(folder, tokenizer, workdir, mesh, *more):
    return [
        f"--config={ROOT}/configs/train_tiny.py",
        f"--workdir={workdir}",
        f"--config.data.files={folder}/text.txt",
        f"--config.data.tokenizer={tokenizer.files[0].parent}",
        f"--config.mesh={mesh}",
        *_SMALL,
        *more,
    ]


def environment(devices, **more):
    ours = ("GLM_JAX", "SLURM", "PYTEST")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    programs = f"{tempfile.gettempdir()}/glm_jax_programs_{os.getppid()}_{devices}"
    return inherited | {
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests/without_pytorch",  # which users do not have
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        # Programs that were compiled before, for speed: they are the same.
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **more,
    }


class Started:
    """A process whose output goes to a file, so that it never waits for a reader."""

    def __init__(self, command, variables):
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=self._output, stderr=subprocess.STDOUT
        )

    def is_running(self):
        return self.process.poll() is None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def finish(self, status=0):
        """Its output, once it has ended with this exit status."""
        self.process.wait(timeout=_HANGS)
        self._output.seek(0)
        output = self._output.read()
        assert self.process.returncode == status, output[-3000:]
        return output


def start_joined(command, count, devices=8, heartbeat=10):
    """A launcher as `count` processes over gloo, with all devices among them."""
    more = [f"--num_processes={count}", f"--heartbeat_seconds={heartbeat}"]
    more += [f"--coordinator=127.0.0.1:{free_port()}"] if count > 1 else []
    return [
        Started(
            [sys.executable, "-m", *command, *more, f"--process_id={number}"],
            environment(devices // count),
        )
        for number in range(count)
    ]


def ready(url):
    """The status of a server's /ready, or None where no one listens."""
    try:
        return httpx2.get(url + "/ready", timeout=60).status_code
    except httpx2.TransportError:
        return None


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def in_kubernetes(folder, job, given, devices):
    """A template's pods, with this machine's addresses and arguments."""
    jobset = yaml.safe_load((ROOT / f"launch/kubernetes/{job}.yaml").read_text())
    [workers] = jobset["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(variables["GLM_JAX_NUM_PROCESSES"]) == spec["completions"] == spec["parallelism"]
    if "GLM_JAX_COORDINATOR" in variables:
        # As a JobSet names its pods: set, job, number of the job, number of the pod.
        name = jobset["metadata"]["name"]
        address, port = variables["GLM_JAX_COORDINATOR"].split(":")
        assert address == f"{name}-{workers['name']}-0-0.{name}"
        assert int(port) > 1024
        variables["GLM_JAX_COORDINATOR"] = f"127.0.0.1:{free_port()}"
    command = [sys.executable, *container["command"][1:], *given]
    return [
        Started(command, environment(devices, **variables, JOB_COMPLETION_INDEX=str(i)))
        for i in range(spec["completions"])
    ]


def slurm_variables(folder, srun):
    """The environment of a batch script on two nodes, with an `srun` that is this script, and
    an `scontrol` that writes what is requeued to FOLDER/requeued."""
    programs = folder / "bin"
    programs.mkdir()
    control = (
        f'[ "$1" = requeue ] && echo "$2" >> "{folder}/requeued"\necho 127.0.0.1\necho 127.0.0.2'
    )
    for name, text in (("scontrol", control), ("srun", srun)):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }


def in_slurm(folder, job, given, devices):
    """The batch script, with an srun that starts two tasks here."""
    two_tasks = 'shift\nSLURM_PROCID=0 "$@" & first=$!\nSLURM_PROCID=1 "$@" || exit 1\nwait $first'
    variables = environment(
        devices,
        **slurm_variables(folder, two_tasks),
        GLM_JAX_PORT=str(free_port()),
        GLM_JAX_PYTHON=sys.executable,
    )
    return [Started(["bash", str(ROOT / f"launch/slurm/{job}.sh"), *given], variables)]


class ServerProcess:
    """`launch.serve` in a process of its own.

    Attributes:
      url: where it is.
    """

    def __init__(self, *given, devices=1):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.serve", "--port=0", *given],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self):
        first = self.process.stdout.readline()
        assert first.startswith("serving "), first
        self.url = first.split()[-1]
        deadline = time.monotonic() + _HANGS
        while httpx2.get(self.url + "/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def save_tiny(folder, tokenizer):
    """Writes a model folder with random weights."""
    config = glm_config("tiny", vocab_size=4096, max_sequence_length=128)
    config = config.replace(special_tokens=tokenizer.special_tokens)
    params = glm_params.init(config, jax.random.key(0))
    save_model(folder, config, params, tokenizer.files)
    return config, params


class StopError(Exception):
    """Ends a run in the middle."""


def broken_at(step, monkeypatch):
    """Lets a run come to a step, and no further."""
    real = metrics.MetricsLogger.log

    def log(self, at, *metrics):
        if at == step:
            raise StopError
        real(self, at, *metrics)

    monkeypatch.setattr(metrics.MetricsLogger, "log", log)
