"""What is read of a model folder, and what memory that takes: `make test-slow`."""

import sys

import pytest
from running import Started, environment, free_port

from glm_jax.config import GLMConfig
from launch.suites.convert import make_parts

PROCESSES = 8
MODEL = GLMConfig(
    num_layers=4, hidden_size=2048, inner_hidden_size=5632, num_heads=16, vocab_size=16384
)
# Bytes that the process has read, before and after, and its largest size.
_SCRIPT = """
import sys
import jax
from glm_jax import processes
from glm_jax.checkpoints.model_folder import restore
from glm_jax.sharding import make_mesh

folder, coordinator, number, count = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
if count > 1:
    processes.join(coordinator, number, count)
mesh = make_mesh((1, 1, count))
read = lambda: int(open("/proc/self/io").readline().split()[1])
status = lambda: open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
peak = lambda: 1024 * int(status())
jax.block_until_ready(jax.numpy.zeros(8) + 1)
open("/proc/self/clear_refs", "w").write("5")  # the peak is what is there now
before, small = read(), peak()
_, params = restore(folder, mesh)
jax.block_until_ready(params)
print("read", read() - before, "grown", peak() - small)
"""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load") / "downloads"
    make_parts(folder, MODEL, 2, 1 << 26)
    return folder


def _convert(downloads, output, *more):
    command = [sys.executable, "-m", "convert.sat_to_orbax", f"--input={downloads}"]
    Started([*command, f"--output={output}", *more], environment(1)).finish()
    return sum(file.stat().st_size for file in (output / "params").rglob("*") if file.is_file())


def _restore(folder, count):
    coordinator = f"127.0.0.1:{free_port()}"
    started = [
        Started(
            [sys.executable, "-c", _SCRIPT, str(folder), coordinator, str(number), str(count)],
            environment(1),
        )
        for number in range(count)
    ]
    lines = [process.finish().splitlines() for process in started]
    return [next(x for x in of if x.startswith("read ")).split() for of in lines]


def test_each_of_eight_processes_reads_its_eighth(downloads, tmp_path):
    size = _convert(downloads, tmp_path / "model")
    shares = [int(words[1]) / size for words in _restore(tmp_path / "model", PROCESSES)]
    print(f"of {size / 2**20:.0f} MiB each of {PROCESSES} reads {shares}")
    assert max(shares) < 1.05 / PROCESSES
    assert min(shares) > 0.95 / PROCESSES


def test_few_bits_never_become_floats(downloads, tmp_path):
    """A layer in float16 would be 100 MiB more."""
    size = _convert(downloads, tmp_path / "model", "--quantization=int4")
    [words] = _restore(tmp_path / "model", 1)
    grown = int(words[3])
    print(f"{size / 2**20:.0f} MiB stored, memory grew by {grown / 2**20:.0f}")
    assert 0.9 * size < grown < size + (110 << 20)
