"""The demo with half of its steps, from its corpus to its tables."""

import re
import sys

from running import Started, environment


def test_the_demo_from_end_to_end(tmp_path):
    """What it is taught by adapters it fills in better than by the commonest answer, which it
    did not before, and what it knew is not lost."""
    command = [sys.executable, "-m", "launch.demo", f"--output={tmp_path}/demo", "--steps=1100"]
    # Most of it is training, for which XLA's optimisations pay.
    output = Started(command, environment(1, XLA_FLAGS="")).finish()
    for line in ("float32 ", "INT8 ", "INT4 ", "filling in the commonest answer"):
        assert f"\n{line}" in output
    assert "loss: " in output
    lines = {name: re.findall(rf"^{name} .*", output, re.M)[0] for name in ("before", "after")}
    print(*lines.values(), sep="\n")
    cell = re.compile(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)")
    cells = {
        name: [tuple(map(float, found)) for found in cell.findall(line)]
        for name, line in lines.items()
    }
    baseline = float(re.search(r"commonest continent: ([\d.]+)%", output)[1])
    for language in (0, 1):
        _, _, before_high = cells["before"][language]
        _, after_low, _ = cells["after"][language]
        assert before_high < after_low
        assert after_low > baseline
        old_before, old_after = (cells[name][2 + language] for name in ("before", "after"))
        assert old_after[2] > old_before[1]
