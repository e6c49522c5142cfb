"""Blocks that wait on hosts come to GPUs and TPUs while those before them run."""

import math
import re

import pytest
from aot.compiling import hardware

from glm_jax.config import glm_130b
from glm_jax.planning import topology
from glm_jax.planning.engine_programs import lower_engine
from glm_jax.sharding import make_mesh

# XLA writes the hosts' memory as S(5).
_START = re.compile(r"%(?P<name>[\w.\-]+) = \(\((?P<of>\w+\[[\d,]+\])\{[^}]*S\(5\)")
_WORK = re.compile(r" (?:fusion|custom-call|dot|convolution|all-reduce|all-reduce-start)\(")
KERNELS = 4


def _loop_copies(text):
    """Of each large stack that a loop copies from: lines of work while a copy is on its way."""
    lines = text[: text.index("\nENTRY ")].splitlines()
    between = {}
    for first, line in enumerate(lines):
        match = _START.search(line)
        if match is None or "-start(" not in line:
            continue
        done = re.compile(rf"-done\(.*%{re.escape(match['name'])}[\s,)]")
        end = next(i for i in range(first + 1, len(lines)) if done.search(lines[i]))
        work = sum(_WORK.search(x) is not None for x in lines[first + 1 : end])
        between[match["of"]] = max(work, between.get(match["of"], 0))
    large = lambda of: math.prod(map(int, of[:-1].split("[")[1].split(","))) > 10**8
    return {of: work for of, work in between.items() if large(of)}


@pytest.mark.parametrize(
    ("name", "devices", "dtype", "limit"),
    # On the v5p a step has 13.7 GiB of temporaries: a limit of 80 GiB, which fitted while the
    # blocks that stay were stacked, fits no more.
    [("v100", 8, "float16", 24), ("tpu_v5p", 2, "bfloat16", 76)],
)
def test_the_next_block_is_copied_while_one_runs(name, devices, dtype, limit):
    described = hardware(name)
    config = glm_130b(compute_dtype=dtype, param_dtype=dtype)
    mesh = make_mesh((1, 1, devices), topology.devices(described, devices))
    lowered = lower_engine(
        config, mesh, None, slots=1, prefill_width=64, max_length=2048, weight_memory_limit=limit
    )
    compiled = lowered["step"].compile()
    taken = compiled.memory_analysis()
    assert taken.host_argument_size_in_bytes > 2**30
    kept = limit * 2**30 + taken.alias_size_in_bytes
    assert taken.argument_size_in_bytes < 1.01 * kept
    assert kept + taken.temp_size_in_bytes < described.memory_bytes
    copies = _loop_copies(compiled.as_text())
    assert len(copies) == KERNELS, copies
    assert all(copies.values()), copies
