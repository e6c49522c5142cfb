"""Runs that are killed at random moments lose nothing: `make test-slow`."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import arguments, environment, finish, free_port, start

STEPS, KILLS = 240, 20


@pytest.fixture
def text(tmp_path, corpus):
    (tmp_path / "text.txt").write_text("\n".join(corpus.sentences[:300]), encoding="utf-8")
    return tmp_path


def _start(folder, tokenizer, workdir, count):
    mesh = "1,1,1" if count == 1 else "2,2,2"
    command = [
        sys.executable, "-m", "launch.train",
        *arguments(folder, tokenizer, workdir, mesh, f"--config.steps={STEPS}"),
    ]  # fmt: skip
    # A cache of programs, for speed: compiled ones are the same.
    variables = environment(
        8 // count if count > 1 else 1,
        JAX_COMPILATION_CACHE_DIR=str(folder / f"programs{count}"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    if count == 1:
        return [start(command, variables)]
    port = free_port()
    several = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    return [start([*command, *several, f"--process_id={i}"], variables) for i in range(count)]


def _lines(workdir):
    try:
        text = (workdir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _last_step(workdir):
    return max((line["step"] for line in _lines(workdir)), default=0)


def _kill(started):
    for process in started:
        process.send_signal(signal.SIGKILL)
    for process in started:
        process.communicate()


def _until(moment, started, workdir):
    """Waits for a time since the start, or for a step to be logged, and a little more."""
    kind, value, more = moment
    began = time.monotonic()
    while all(process.poll() is None for process in started):
        if kind == "seconds" and time.monotonic() - began >= value:
            return
        if kind == "step" and _last_step(workdir) >= value:
            time.sleep(more)
            return
        assert time.monotonic() - began < 200, "no progress"
        time.sleep(0.02)


@pytest.mark.parametrize("count", [1, 2])
def test_twenty_kills_at_random_moments_change_no_bit(text, tokenizer, count, capsys):
    finish(_start(text, tokenizer, text / "whole", count))
    rng = random.Random(count)
    steps = sorted(rng.sample(range(1, STEPS - 20), KILLS - 5))
    moments = [("step", step, rng.uniform(0, 0.3)) for step in steps]
    for _ in range(5):  # while it starts, restores or compiles
        moments.insert(rng.randrange(len(moments)), ("seconds", rng.uniform(1, 8), 0))
    log = []
    for number, moment in enumerate(moments, 1):
        started = _start(text, tokenizer, text / "killed", count)
        _until(moment, started, text / "killed")
        assert all(process.poll() is None for process in started), started[0].communicate()[0]
        _kill(started)
        log.append(
            f"kill {number}: {moment[0]} {moment[1]:.1f}, at step {_last_step(text / 'killed')}"
        )
    finish(_start(text, tokenizer, text / "killed", count))
    with capsys.disabled():
        print(f"\n{count} process(es):", *log, sep="\n  ")
    expected, got = _lines(text / "whole"), _lines(text / "killed")
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    for name in ("loss", "gradient_norm", "update_norm", "activation_scale", "learning_rate"):
        assert [line[name] for line in got] == [line[name] for line in expected], name


def test_without_room_the_last_checkpoint_stays(text, tokenizer):
    """On a file system of 12 MB, which a second checkpoint does not fit into."""
    workdir = text / "small"
    workdir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(workdir)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("no file system can be mounted here (that takes root)")
    try:
        more = ["--config.checkpoints_kept=20", "--config.model.hidden_size=64"]
        command = [sys.executable, "-m", "launch.train"]
        command += arguments(text, tokenizer, workdir, "1,1,1", *more, "--config.steps=60")
        process = start(command, environment(1))
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 1
        last = output.strip().splitlines()[-1]
        assert last.startswith("error: no room for "), output[-2000:]
        assert "the last whole checkpoint is step 5" in last
        assert "Traceback" not in output
        # With room the same command goes on from there.
        room = ["mount", "-o", "remount,size=400m", str(workdir)]
        subprocess.run(room, check=True)
        assert "the model is in" in finish([start(command, environment(1))])[0]
        assert _lines(workdir)[-1]["step"] == 60
    finally:
        subprocess.run(["umount", str(workdir)], check=True)


def test_memory_stays_flat_over_a_long_run(text, tokenizer):
    """Resident memory after 200 steps is what it was after 100, to a tenth."""
    started = _start(text, tokenizer, text / "run", 1)
    sizes = {}
    while started[0].poll() is None:
        step = _last_step(text / "run")
        for at in (100, 200):
            if step >= at and at not in sizes:
                pages = int(Path(f"/proc/{started[0].pid}/statm").read_text().split()[1])
                sizes[at] = pages * resource.getpagesize()
        time.sleep(0.05)
    finish(started)
    assert sizes[200] < 1.1 * sizes[100], sizes
