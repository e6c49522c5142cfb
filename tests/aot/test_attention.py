"""Attention over ranges of keys compiles for GPUs and TPUs without an array of S x S."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from aot.assembled import assemble, printed_kernels
from aot.compiling import compile_for, hardware

from glm_jax.config import glm_config
from glm_jax.kernels.attention.api import attention
from glm_jax.kernels.attention.dropout import WeightDropout
from glm_jax.kernels.dispatch import BackendError
from glm_jax.planning import topology
from glm_jax.sharding import make_mesh
from glm_jax.training.recipe import Recipe
from glm_jax.training.step import with_attention_for

HEADS, HEAD_DIM, LENGTH = 12, 128, 2048  # of a device that holds an eighth of GLM-130B
DEVICES = ["a100_40gb", "rtx_3090", "h100", "rtx_2080_ti", "tpu_v5e", "tpu_v5p", "tpu_v6e"]


def _operands(bounds=2):
    query = jax.ShapeDtypeStruct((1, LENGTH, HEADS, HEAD_DIM), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, HEADS, LENGTH, HEAD_DIM), jnp.bfloat16)
    return query, keys, keys, jax.ShapeDtypeStruct((1, LENGTH, bounds), jnp.int32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bounds", [2, 4])
def test_prefill(device, bounds):
    compiled = compile_for(device, attention, *_operands(bounds))
    scores = 4 * HEADS * LENGTH * LENGTH
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2
    takes_library = bounds == 2 and device in ("a100_40gb", "rtx_3090", "h100")
    text = compiled.as_text()
    assert ("flash_attention" in text) == takes_library
    assert ("tpu_custom_call" in text) == (bounds == 2 and device.startswith("tpu"))


@pytest.mark.parametrize("device", DEVICES)
def test_gradient(device):
    def gradient(query, key, value, ranges):
        loss = lambda *inputs: jnp.sum(attention(*inputs, ranges).astype(jnp.float32))
        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    compiled = compile_for(device, gradient, *_operands())
    scores = 4 * HEADS * LENGTH * LENGTH
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2


# Instructions a score that the loop of each kernel may have, with ranges compared: of the output,
# of keys' and values' gradients, and of queries' gradient.
MOST = {0.0: (11.0, 15.2, 13.2), 0.1: (18.2, 24.0, 21.5)}


@pytest.mark.parametrize("rate", MOST)
def test_the_kernel_for_training(rate, monkeypatch, capfd, tmp_path):
    """Forward and backward are three kernels, and no array of S x S, dropout's or scores, is."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    run = functools.partial(attention, implementation="mosaic")

    def gradient(query, key, value, ranges, seed):
        dropout = WeightDropout(seed, rate) if rate else None
        loss = lambda *inputs: jnp.sum(run(*inputs, ranges, dropout=dropout).astype(jnp.float32))
        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    operands = (*_operands(), jax.ShapeDtypeStruct((), jnp.uint32))
    compiled = compile_for("h100", gradient, *operands)
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 3
    assert compiled.memory_analysis().temp_size_in_bytes < HEADS * LENGTH * LENGTH
    kernels = [assemble(ptx, tmp_path) for ptx in printed_kernels(capfd)]
    # A score takes 2, 4 or 3 products of 128 numbers.
    for kernel, most, products in zip(kernels, MOST[rate], (2, 4, 3), strict=True):
        assert kernel.spilled_bytes == 0
        assert not kernel.is_serialized
        if (loop := kernel.outer_loop("HGMMA")) is not None:
            # Of a thread, one of 128.
            scores = sum(map(_products, loop)) / (128 * 128) / products
            print(f"{len(loop) / scores:.1f} instructions a score")
            assert len(loop) / scores <= most
    with pytest.raises(BackendError, match=r"it takes compute capability 9\.0"):
        compile_for("a100_40gb", gradient, *operands)


def _products(instruction):
    """Multiplications of a matrix instruction; 0 of others."""
    found = re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction)
    return math.prod(map(int, found.groups())) if found else 0


def test_a_run_with_dropout_has_the_kernel_on_compute_capability_9():
    """Elsewhere plain XLA, as the library's kernel has no dropout."""
    config = glm_config("tiny", hidden_size=256, num_heads=2, compute_dtype="bfloat16")
    for name, expected in (("h100", "mosaic"), ("a100_40gb", "auto")):
        mesh = make_mesh((1, 1, 1), topology.devices(hardware(name)))
        with topology.compiling_for(mesh):
            recipe = with_attention_for(config, Recipe(total_samples=8), mesh, 2, 256)
        assert recipe.attention == expected
    dropped = lambda *x: attention(*x[:4], dropout=WeightDropout(x[4], 0.1))
    operands = (*_operands(), jax.ShapeDtypeStruct((), jnp.uint32))
    assert "flash_attention" not in compile_for("a100_40gb", dropped, *operands).as_text()
