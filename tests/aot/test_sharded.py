"""Under a mesh, GLM-130B's products move sums of parts between devices, never weights."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from aot.compiling import hardware
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax.config import glm_config
from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.model import params as glm_params
from glm_jax.planning import topology
from glm_jax.quantization import Scheme, quantize
from glm_jax.sharding import make_mesh

_EXCHANGE = re.compile(
    r" (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(-start)?\("
)


@pytest.mark.parametrize("name", glm_params.LINEAR_NAMES)
@pytest.mark.parametrize("scheme", [Scheme(4, search=False), Scheme(8, 128, search=False)])
@pytest.mark.parametrize(
    ("device", "shape"),
    [("a100_40gb", (1, 1, 8)), ("a100_40gb", (1, 2, 4)), ("tpu_v5p", (1, 2, 2))],
)
def test_no_weight_moves(name, scheme, device, shape):
    count = shape[1] * shape[2]
    mesh = make_mesh(shape, topology.devices(hardware(device), count))
    spec = getattr(glm_params.specs(glm_config("130b", num_layers=1)).layers, name).kernel
    axes = glm_params.KERNEL_AXES[name]
    weight = jax.eval_shape(
        lambda kernel: quantize(kernel, scheme, -len(axes), axes),
        jax.ShapeDtypeStruct(spec.shape[1:], jnp.bfloat16),
    )
    values, scales = glm_params.quantized_sharding(
        mesh, spec, (1, *weight.values.shape), (1, *weight.scales.shape)
    )
    unstacked = lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:]))
    weight = weight.replace(
        values=jax.ShapeDtypeStruct(
            weight.values.shape, weight.values.dtype, sharding=unstacked(values)
        ),
        scales=jax.ShapeDtypeStruct(
            weight.scales.shape, weight.scales.dtype, sharding=unstacked(scales)
        ),
    )
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((1, 1, weight.shape[0]), jnp.bfloat16, sharding=whole)
    with topology.compiling_for(mesh):
        compiled = jax.jit(quantized_matmul).lower(x, weight).compile()
    assert f"quantized_matmul_int{scheme.bits}" in compiled.as_text()
    exchanges = [line for line in compiled.as_text().splitlines() if _EXCHANGE.search(line)]
    inputs = mesh.shape["tensor" if axes[0] in ("heads", "mlp") else "fsdp"]
    assert bool(exchanges) == (inputs > 1), exchanges
    for line in exchanges:
        for dtype, dimensions in re.findall(r"(\w+)\[([\d,]+)\]", line):
            elements = math.prod(map(int, dimensions.split(",")))
            assert dtype != "s8", line
            assert elements <= 65536, line  # one row of activations or sums at most
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes < 1.1 * weight.nbytes / count + x.size * 2
