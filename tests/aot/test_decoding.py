"""The engine's programs at GLM-130B's size compile for the paper's hardware, and fit."""

import pytest
from aot.compiling import collectives, hardware

from glm_jax.config import glm_130b
from glm_jax.planning import topology
from glm_jax.planning.engine_programs import lower_engine
from glm_jax.planning.training_programs import memory
from glm_jax.sharding import make_mesh

CASES = [
    # hardware, devices, weights, compute, cache, slots; each takes a minute or two of a core
    ("a100_40gb", 8, None, "float16", None, 2),
    ("v100", 8, "int8", "float16", None, 2),
    ("rtx_3090", 8, "int8", "float16", None, 1),
    ("rtx_3090", 4, "int4", "float16", "int8", 1),
    ("rtx_2080_ti", 8, "int4", "float16", "int8", 1),
    ("h100", 2, "int4", "bfloat16", None, 8),
    ("tpu_v5p", 4, None, "bfloat16", None, 8),
]


# The one that is nearest to its memory, int4 for a kernel; the others are slow, and take no other
# way than it or what test_plan compiles.
FIRST = (("rtx_3090", "int4"),)


def _marked(case):
    is_first = (case[0], case[2]) in FIRST
    return pytest.param(
        case, id="-".join(map(str, case)), marks=() if is_first else pytest.mark.slow
    )


@pytest.mark.parametrize("case", map(_marked, CASES))
def test_fits_with_2048_positions(case):
    name, devices, weights, dtype, cache, slots = case
    described = hardware(name)
    mesh = make_mesh((1, 1, devices), topology.devices(described, devices))
    config = glm_130b().replace(compute_dtype=dtype, param_dtype=dtype, cache_dtype=cache)
    programs = lower_engine(config, mesh, weights, slots=slots, prefill_width=2048)
    for program, lowered in programs.items():
        compiled = lowered.compile()
        taken = memory(compiled)
        print(f"{name} x {devices} {program}: {taken.total / 2**30:.1f} GiB", flush=True)
        assert taken.total < described.memory_bytes, program
        # Sums of parts and, of what tokens are chosen from, the scores: never weights.
        scores = 4 * slots * config.vocab_size
        rows = max(slots, 2048 if program == "prefill" else 0)
        sums = config.num_layers * 4 * 2 * rows * config.hidden_size
        moved = sum(size for _, size in collectives(compiled).values())
        assert moved < 8 * scores + 2 * sums, collectives(compiled)
