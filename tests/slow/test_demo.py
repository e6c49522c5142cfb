"""The demo with few steps, from its corpus to its table."""

import sys

from running import Started, environment


def test_the_demo_from_end_to_end(tmp_path):
    command = [sys.executable, "-m", "launch.demo", f"--output={tmp_path}/demo", "--steps=12"]
    output = Started(command, environment(1)).finish()
    for line in ("float32 ", "INT8 ", "INT4 ", "filling in the commonest answer"):
        assert f"\n{line}" in output
    assert "loss: " in output
