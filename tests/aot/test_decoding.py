"""The engine's programs at GLM-130B's size compile for the paper's hardware, and fit."""

import jax
import pytest
from aot.compiling import hardware

from glm_jax.config import glm_130b
from glm_jax.planning import topology
from glm_jax.planning.decoding import compile_engine
from glm_jax.planning.programs import collectives, memory
from glm_jax.sharding import make_mesh

CASES = [
    # hardware, devices, weights, compute, cache, slots
    ("a100_40gb", 8, None, "float16", None, 2),
    ("v100", 8, "int8", "float16", None, 2),
    ("rtx_3090", 8, "int8", "float16", None, 1),
    ("rtx_3090", 4, "int4", "float16", "int8", 1),
    ("rtx_2080_ti", 8, "int4", "float16", "int8", 1),
    ("h100", 2, "int4", "bfloat16", None, 8),
    ("tpu_v5p", 8, None, "bfloat16", None, 8),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_fits_with_2048_positions(case):
    name, devices, weights, dtype, cache, slots = case
    described = hardware(name)
    mesh = make_mesh((1, 1, devices), topology.devices(described, devices))
    config = glm_130b().replace(compute_dtype=dtype, param_dtype=dtype, cache_dtype=cache)
    programs = compile_engine(config, mesh, weights, slots=slots, prefill_width=2048)
    for program, compiled in programs.items():
        taken = memory(compiled)
        print(f"{name} x {devices} {program}: {taken.total / 2**30:.1f} GiB", flush=True)
        assert taken.total < described.memory_bytes, program
        # Sums of parts: two a block and one for embedding or logits, and no weights.
        found = collectives(compiled)
        assert set(found) <= {"all-reduce", "all-gather"}, found
