"""A conversion that is killed at random moments goes on where it was: `make test-slow`."""

import json
import random
import subprocess
import sys
import time

from running import Started, environment

from convert.model_readers import open_model
from convert.verify import compare
from glm_jax.checkpoints.model_folder import CheckpointError, load_config
from glm_jax.config import GLMConfig
from launch.suites.convert import make_parts

KILLS = 20
MODEL = GLMConfig(
    num_layers=200, hidden_size=128, inner_hidden_size=256, num_heads=8, vocab_size=16384
)


def _start(source, output):
    command = [sys.executable, "-m", "convert.sat_to_orbax"]
    return Started([*command, f"--input={source}", f"--output={output}"], environment(1))


def _parts(output):
    folder = output.with_name(output.name + ".partial") / "params"
    return {p.name for p in folder.glob("*") if "." not in p.name} if folder.is_dir() else set()


def test_twenty_kills_at_random_moments_change_nothing(tmp_path, capsys):
    make_parts(tmp_path / "downloads", MODEL, 2, 1 << 22)
    _start(tmp_path / "downloads", tmp_path / "whole").finish()
    rng, log, before = random.Random(0), [], set()
    output = tmp_path / "killed"
    for number in range(1, KILLS + 1):
        started, began = _start(tmp_path / "downloads", output), time.monotonic()
        # Some while it starts, most after some more parts.
        wanted = len(before) + (0 if number % 4 == 0 else rng.randrange(1, 3))
        while len(_parts(output)) < wanted and time.monotonic() - began < 60:
            assert started.is_running(), started.finish(1)
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05 if number % 4 else 2.0))
        assert started.is_running(), started.finish()  # or there was nothing to kill
        started.kill()
        after = _parts(output)
        log.append(f"kill {number}: {len(before)} parts before, {len(after)} after")
        assert before <= after, "a part that was whole is gone"
        assert not output.exists(), "the name was given too early"
        for path in (output, output.with_name("killed.partial")):
            try:
                load_config(path)
                raise AssertionError(f"{path} passes for a model")
            except CheckpointError:
                pass
        before = after
    _start(tmp_path / "downloads", output).finish()
    with capsys.disabled():
        print("\n" + "\n".join(log))
    assert all(d is None for d in compare(open_model(output), open_model(tmp_path / "whole")))
    names = lambda folder: {p.name for p in (folder / "params").iterdir()}
    assert names(output) == names(tmp_path / "whole")
    assert not output.with_name("killed.partial").exists()
    provenance = [
        json.loads((tmp_path / x / "provenance.json").read_text()) for x in ("whole", "killed")
    ]
    assert provenance[0] == provenance[1]


def test_two_processes_at_once_share_the_work(tmp_path):
    make_parts(tmp_path / "downloads", MODEL, 2, 1 << 22)
    command = [
        sys.executable, "-m", "convert.sat_to_orbax", f"--input={tmp_path / 'downloads'}",
        f"--output={tmp_path / 'model'}", "--num_processes=2",
    ]  # fmt: skip
    started = [Started([*command, f"--process_id={i}"], environment(1)) for i in range(2)]
    outputs = [process.finish() for process in started]
    assert any("wrote" in output for output in outputs)
    assert subprocess.run(
        [sys.executable, "-m", "convert.verify", tmp_path / "downloads", tmp_path / "model"],
        env=environment(1), capture_output=True, cwd=tmp_path,
    ).returncode == 0  # fmt: skip
