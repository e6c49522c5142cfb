"""A model in the form that decodes fastest where it is."""

import jax

from glm_jax.errors import UserError
from glm_jax.kernels.quantized_matmul import cpu
from glm_jax.kernels.quantized_matmul.api import is_quantized
from glm_jax.kernels.quantized_matmul.api import prepare as prepare_weight
from glm_jax.model.params import (
    AdaptedKernel,
    GLMParams,
    LinearParams,
    map_linears,
    unstack_layers,
)
from glm_jax.model.streamed_layers import OffloadedLayers
from glm_jax.quantization import Scheme, quantize

_EMBEDDING_GROUP = 128  # inputs that share a scale, of an embedding in 4 bits


class PrecisionError(UserError):
    """A precision that is not to be had here."""


def prepare(
    params: GLMParams, activation_bits: int | None = None, embedding_bits: int | None = None
) -> GLMParams:
    """Parameters in the form that decodes fastest here.

    A loop over stacked layers copies each layer's weights in every step, so layers are put
    apart; where `restore` did that already, nothing is copied. On a single CPU device kernels
    and embedding are laid out for the CPU kernel. Call it once where many prompts follow.

    Args:
      activation_bits: 8 to round activations too and multiply integers, of quantised
        weights alone: faster, for about half a percent of error a product.
      embedding_bits: 8 or 4 to quantise the embedding, which is also the output projection;
        in 4 bits with a scale for each 128 inputs.

    Raises:
      PrecisionError: one of these was asked for, and this is not one CPU device with the
        kernel built and all weights, or the kernel does not take the embedding's shape.
    """
    device, *others = jax.tree.leaves(params)[0].devices()
    is_one_cpu = device.platform == "cpu" and not others
    is_offloaded = isinstance(params.layers, OffloadedLayers)
    can_narrow = is_one_cpu and cpu.is_available() and not is_offloaded
    if (activation_bits or embedding_bits) and not can_narrow:
        raise PrecisionError(
            "activations and embedding in few bits are for one CPU device, its kernel built, "
            "and all weights in its memory: leave out activation_bits and embedding_bits"
        )
    if is_offloaded:
        return params
    params = unstack_layers(params)
    if not is_one_cpu:
        return params
    params = map_linears(lambda _, linear: _prepared(linear, activation_bits), params)
    table = params.word_embeddings
    if not is_quantized(table):
        table = table.T
        if embedding_bits is not None:
            table = quantize(table, _embedding_scheme(embedding_bits, len(table)), -2)
        tiled = prepare_weight(table, activation_bits)
        is_tiled = isinstance(tiled, cpu.TiledArray)
        if embedding_bits is not None and not is_tiled:
            raise PrecisionError(
                f"embedding_bits={embedding_bits}: the CPU kernel takes widths that divide by "
                f"8, this model's is {table.shape[0]}; leave it out"
            )
        table = tiled if is_tiled else params.word_embeddings
    prepared: GLMParams = params.replace(word_embeddings=table)  # type: ignore[attr-defined]
    return prepared


def _prepared(linear: LinearParams, activation_bits: int | None) -> LinearParams:
    kernel = linear.kernel
    if isinstance(kernel, AdaptedKernel):
        frozen = prepare_weight(kernel.frozen, activation_bits)
        kernel = kernel.replace(frozen=frozen)  # type: ignore[attr-defined]
    else:
        kernel = prepare_weight(kernel, activation_bits)
    return LinearParams(kernel, linear.bias)


def _embedding_scheme(bits: int, inputs: int) -> Scheme:
    groups = bits == 4 and inputs % _EMBEDDING_GROUP == 0
    return Scheme(bits, _EMBEDDING_GROUP if groups else None)
