"""`launch.tune --measure` is killed, leaves no process behind, and goes on where it was."""

import os
import signal
import subprocess
import sys
import time

from running import ROOT, environment

from glm_jax.kernels.quantized_matmul import measured

COMMAND = [
    sys.executable, "-m", "launch.tune", "--measure", "--checkpoint=random:tiny",
    "--tensor_parallel=1", "--quantization=int4", "--rows=1",
]  # fmt: skip


def _running(text):
    """Command lines of processes that name a text."""
    found = []
    for folder in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{folder}/cmdline", encoding="utf-8") as file:
                found.append(file.read())
        except OSError:
            continue
    return [line for line in found if text in line]


def test_killed_while_it_measures(tmp_path):
    output, variables = tmp_path / "tables", environment(1)
    command = [*COMMAND, f"--output={output}"]
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(3)]  # the heading, and two products
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lines[0] == "cpu: 4 products, 0 measured before\n"
    ends = time.monotonic() + 10
    while _running(str(output)) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not _running(str(output))
    path = measured.path_in(output, "cpu")
    before = measured.read(path).entries
    assert len(before) in (2, 3)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"cpu: 4 products, {len(before)} measured before" in done.stdout
    after = measured.read(path).entries
    assert len(after) == 4
    assert {key: after[key] for key in before} == before
    assert [file.name for file in output.iterdir()] == ["cpu.json"]
    listed = subprocess.run(
        [sys.executable, "-m", "launch.tune"], cwd=ROOT, text=True, capture_output=True,
        env=variables | {measured.FOLDER: str(output)},
    )  # fmt: skip
    assert listed.stdout.splitlines()[0] == f"{path}: 4 products, 0 candidates left out"
    assert len(listed.stdout.splitlines()) == 5
