"""A decode step is one CUDA graph, our kernels inside: read from the compiled program."""

import re
import shutil

import jax
import pytest
from aot.compiling import compile_for, hardware
from aot.dumping import DUMP

from glm_jax.config import glm_130b
from glm_jax.kernels.paged_attention.api import paged_attention
from glm_jax.planning import topology
from glm_jax.planning.engine_programs import lower_engine
from glm_jax.sharding import make_mesh

# Lines of what XLA:GPU runs: a kind and, of some, a kernel's name. What belongs to a command, as
# a loop's body or what a graph has captured, stands deeper.
_LINE = re.compile(r"( *)\d+: (k\w+) +\[[^\]]*\] *(\S*)")
_FREE = {"kAsyncDone"}  # not a command of its own


def _commands():
    """Kind, name, and whether it is in a graph, of each command of the last compiled program."""
    [file] = DUMP.glob("*thunk_sequence_after_thunk_passes.txt")
    commands, graph = [], None
    for line in file.read_text().splitlines():
        if not (match := _LINE.match(line)):
            continue
        depth, kind, name = len(match[1]), match[2], match[3]
        if graph is not None and depth <= graph:
            graph = None
        if kind == "kCommandBuffer":
            assert graph is None
            graph = depth
        elif kind not in _FREE:
            commands.append((kind, name, graph is not None))
    return commands, file.read_text().count("kCommandBuffer")


@pytest.mark.parametrize(
    ("name", "devices", "weights"),
    [("h100", 1, "int4"), ("h100", 8, "int4"), ("a100_80gb", 8, "int8")],
)
def test_a_decode_step_is_one_graph(name, devices, weights):
    config = glm_130b(num_layers=2).replace(compute_dtype="float16", param_dtype="float16")
    mesh = make_mesh((1, 1, devices), topology.devices(hardware(name), devices))
    lowered = lower_engine(config, mesh, weights, slots=8, prefill_width=16)
    shutil.rmtree(DUMP, ignore_errors=True)
    lowered["step"].compile()
    commands, graphs = _commands()
    captured = [(kind, kernel) for kind, kernel, is_captured in commands if is_captured]
    print(f"{len(captured)} of {len(commands)} commands in {graphs} graph")
    assert (len(captured), graphs) == (len(commands), 1)
    # A Mosaic kernel, which has no name here, or a Triton kernel.
    products = [k for k in captured if k[0] == "kCustomCall" or "quantized_matmul" in k[1]]
    assert len(products) == 4 * config.num_layers
    assert sum("paged_attention" in kernel for _, kernel in captured) == config.num_layers
    kinds = {kind for kind, _ in captured}
    assert {"kConditional", "kWhile"} <= kinds  # what a request may ask for
    assert ("kAllReduce" in kinds) == (devices > 1)


def test_a_mosaic_kernel_is_captured():
    array = jax.ShapeDtypeStruct
    pages = array((12, 300, 64, 128), "float16")

    def attend(query, keys, values, tables, lengths):
        return paged_attention(query, keys, values, tables, lengths, implementation="mosaic")

    rows = array((4, 2, 12, 128), "float16"), pages, pages, array((4, 32), "int32")
    compile_for("h100", attend, *rows, array((4, 2), "int32"))
    commands, _ = _commands()
    assert [is_captured for kind, _, is_captured in commands if kind == "kCustomCall"] == [True]
