"""Training runs in processes of their own."""

import json
import os
import socket
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
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
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GLM_JAX", "SLURM"))}
    programs = f"{tempfile.gettempdir()}/glm_jax_programs_{os.getppid()}_{devices}"
    return inherited | {
        "PYTHONPATH": str(ROOT),
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
        self.process.wait(timeout=240)
        self._output.seek(0)
        output = self._output.read()
        assert self.process.returncode == status, output[-3000:]
        return output


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}
