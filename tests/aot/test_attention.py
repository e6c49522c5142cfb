"""Attention over ranges of keys compiles for GPUs and TPUs without an array of S x S."""

import functools

import jax
import jax.numpy as jnp
import pytest
from aot.compiling import compile_for

from glm_jax.kernels.attention.api import attention
from glm_jax.kernels.attention.dropout import WeightDropout
from glm_jax.kernels.dispatch import BackendError

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
    assert ("flash_attention" in compiled.as_text()) == takes_library


@pytest.mark.parametrize("device", DEVICES)
def test_gradient(device):
    def gradient(query, key, value, ranges):
        loss = lambda *inputs: jnp.sum(attention(*inputs, ranges).astype(jnp.float32))
        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    compiled = compile_for(device, gradient, *_operands())
    scores = 4 * HEADS * LENGTH * LENGTH
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_kernel_for_training(rate):
    """Forward and backward are three kernels, and no array of S x S, dropout's or scores, is."""
    run = functools.partial(attention, implementation="mosaic")

    def gradient(query, key, value, ranges, seed):
        dropout = WeightDropout(seed, rate) if rate else None
        loss = lambda *inputs: jnp.sum(run(*inputs, ranges, dropout=dropout).astype(jnp.float32))
        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    operands = (*_operands(), jax.ShapeDtypeStruct((), jnp.uint32))
    compiled = compile_for("h100", gradient, *operands)
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 3
    assert compiled.memory_analysis().temp_size_in_bytes < HEADS * LENGTH * LENGTH
    with pytest.raises(BackendError, match=r"it takes compute capability 9\.0"):
        compile_for("a100_40gb", gradient, *operands)
