"""Which backend multiplies a quantised matrix on one device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm_jax.kernels import target
from glm_jax.kernels.quantized_matmul import pallas_gpu, pallas_tpu, reference, tuning, xla
from glm_jax.quantization import QuantizedArray


def matmul(
    x: Float[Array, "rows inputs"],
    weight: QuantizedArray,
    bias: Float[Array, " outputs"] | None,
) -> Float[Array, "rows outputs"]:
    """x [rows, K] times weight [K, N] plus bias, on the platform that is compiled for.

    Returns:
      float32 [rows, N].
    """
    product: Array = jax.lax.platform_dependent(
        x, weight, bias, cpu=_reference, cuda=_cuda, tpu=_tpu, default=_xla
    )
    return product


def _cuda(x: Array, weight: QuantizedArray, bias: Array | None) -> Array:
    capability = target.compute_capability()
    if x.dtype == jnp.float32 or capability < target.TRITON_CAPABILITY:
        return _xla(x, weight, bias)
    inputs, outputs = weight.shape
    problem = tuning.Problem(len(x), inputs, outputs, weight.group_size, weight.bits)
    blocks = tuning.lookup(problem, capability)
    if blocks is None:
        return _xla(x, weight, bias)
    return pallas_gpu.matmul(x, weight, bias, blocks)


def _tpu(x: Array, weight: QuantizedArray, bias: Array | None) -> Array:
    if not pallas_tpu.takes(weight):
        return _xla(x, weight, bias)
    return _add(pallas_tpu.matmul(x, weight), bias)


def _xla(x: Array, weight: QuantizedArray, bias: Array | None) -> Array:
    return _add(xla.matmul(x, weight), bias)


def _reference(x: Array, weight: QuantizedArray, bias: Array | None) -> Array:
    return _add(reference.matmul(x, weight), bias)


def _add(product: Array, bias: Array | None) -> Array:
    return product if bias is None else product + bias.astype(jnp.float32)
