"""A model's weights in the layout that decodes fastest on their devices."""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array

from glm_jax.errors import UserError
from glm_jax.kernels.quantized_matmul import cpu, mosaic_check
from glm_jax.kernels.quantized_matmul.api import prepare as prepare_weight
from glm_jax.model import gpu_layout
from glm_jax.model.layer_stacks import as_layers, map_linears, unstack_layers
from glm_jax.model.params import GLMParams, LinearParams
from glm_jax.model.weights import TransposedWeight
from glm_jax.quantization import Scheme, quantize

_EMBEDDING_GROUP = 128  # embed positions that share a scale in a 4-bit embedding


class PrecisionError(UserError):
    """A precision that the devices or the model's shape do not allow."""


def prepare(
    params: GLMParams,
    activation_bits: int | None = None,
    embedding_bits: int | None = None,
    donate: bool = False,
) -> GLMParams:
    """Lays parameters out for fast decoding on the devices that they are on.

    A loop over stacked layers copies each layer's weights in every step, so layers are unstacked;
    where `restore` did that already, nothing is copied. On a single CPU device kernels and
    embedding are laid out for the CPU kernel; on GPUs of compute capability 8.0 to 9.0
    quantised kernels are for theirs, see `gpu_layout`. Call it once before many prompts.

    Args:
      activation_bits: 8 to round activations too and multiply integers, of quantised
        weights alone: faster, for about half a percent of error a product.
      embedding_bits: 8 or 4 to quantise the embedding, which is also the output projection;
        in 4 bits with a scale for each 128 inputs.
      donate: on GPUs, delete each weight of `params` when it is laid out: without it there are
        two copies until the caller lets `params` go.

    Raises:
      PrecisionError: one of these was asked for, and this is not one CPU device with the
        kernel built and all weights, or the kernel does not take the embedding's shape.
    """
    device, *others = jax.tree.leaves(params)[0].devices()
    is_one_cpu = device.platform == "cpu" and not others
    is_streamed = as_layers(params.layers).is_streamed
    can_quantize = is_one_cpu and cpu.is_available() and not is_streamed
    if (activation_bits or embedding_bits) and not can_quantize:
        raise PrecisionError(
            "activations and embedding in few bits are for one CPU device, its kernel built, "
            "and all weights in its memory: leave out activation_bits and embedding_bits"
        )
    params = unstack_layers(params)
    if is_streamed:
        return params
    if not is_one_cpu:
        return gpu_layout.lay_out(params, donate) if mosaic_check.is_for(device) else params

    def lay_out_kernel(_: str, linear: LinearParams) -> LinearParams:
        tile = functools.partial(prepare_weight, activation_bits=activation_bits)
        return LinearParams(linear.weight.laid_out(tile), linear.bias)

    def lay_out_table(table: Array) -> Any:
        columns: Any = table.T
        if embedding_bits is not None:
            columns = quantize(columns, _embedding_scheme(embedding_bits, len(columns)), -2)
        if cpu.can_tile(columns):
            return TransposedWeight(cpu.tile(columns, activation_bits))
        if embedding_bits is not None:
            raise PrecisionError(
                f"embedding_bits={embedding_bits}: the CPU kernel takes widths that divide by "
                f"8, this model's is {columns.shape[0]}; leave it out"
            )
        return table

    table = params.embedding.laid_out(lay_out_table)
    return dataclasses.replace(map_linears(lay_out_kernel, params), word_embeddings=table)


def _embedding_scheme(bits: int, inputs: int) -> Scheme:
    has_groups = bits == 4 and inputs % _EMBEDDING_GROUP == 0
    return Scheme(bits, _EMBEDDING_GROUP if has_groups else None)
