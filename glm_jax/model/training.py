"""The forward pass as training runs it: with dropout, rematerialisation and a measure of
how large activations are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glm_jax.config import GLMConfig
from glm_jax.kernels.attention.arguments import SAVED as ATTENDED
from glm_jax.model import glm, prefetched_layers
from glm_jax.model.glm import HIDDEN_AXES
from glm_jax.model.layer_stacks import as_layers
from glm_jax.model.layers import PRODUCT, Dropout, drop, layer_norm, rotary_factors
from glm_jax.model.params import GLMParams, LayerParams
from glm_jax.model.streamed_layers import DEVICE_MEMORY, HOST_MEMORY
from glm_jax.model.visibility import Visibility
from glm_jax.sharding import constrain, constrain_parameters, gather, scatter

# What the backward pass finds saved of a block: all that it needs, or the block's input and the
# results with these names. Not JAX's `dots_saveable`: that saves products in float32, before they
# are rounded, and none of those that have a gradient of their own.
# With "offload" the results wait in hosts' memory, to which XLA copies beside the products.
_SAVED = {"dots": (PRODUCT, ATTENDED), "attention": (ATTENDED,)}
_OFFLOADED = {"offload": (PRODUCT, ATTENDED)}
REMAT_POLICIES = ("none", "dots", "offload", "attention", "blocks")
_EMBEDDING = 2**30  # no layer's number
# Between blocks each device of a tensor group has a part of every row ("Reducing Activation
# Recomputation in Large Transformer Models", arXiv:2205.05198, section 4.2.2): what the backward
# pass finds saved is then divided by the group's size.
_SAVED_AXES = ("batch", "saved_seq", "embed")
TABLE_AXES = ("vocab", "embed")


def training_hidden(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[Array, "batch seq"],
    position_ids: Int[Array, "batch seq"],
    visibility: Visibility,
    remat: str = "none",
    dropout: Dropout | None = None,
    attention: str | None = None,
) -> tuple[Float[Array, "batch seq embed"], Float[Array, " layers"]]:
    """Return the final hidden states, and the root mean square of each block's output.

    Args:
      remat: one of `REMAT_POLICIES`.
      dropout: of the embedding, attention's weights and output, the feed-forward's output.
      attention: name of its implementation; None for the preferred one.
    """

    def run(x: Array, layer: LayerParams, index: Array | int, shared: Any) -> tuple[Array, Array]:
        rotary, key_ranges, dropout = shared
        x, _ = glm.block(
            x,
            layer,
            config,
            rotary,
            key_ranges,
            dropout=None if dropout is None else dropout.of_layer(index),
            implementation=attention,
            residual_axes=_SAVED_AXES,
        )
        return x, jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))

    x = embed_rows(params.word_embeddings, tokens, config.activation_dtype)
    x = scatter(x, _SAVED_AXES, HIDDEN_AXES)
    x = drop(x, None if dropout is None else dropout.of_layer(_EMBEDDING), 0)
    shared = (rotary_factors(config, position_ids), visibility.key_ranges, dropout)
    x, scales = _run_layers(run, params.layers, config, constrain(x, _SAVED_AXES), shared, remat)
    x = layer_norm(x, params.final_layernorm, config.layernorm_epsilon)
    return gather(x, _SAVED_AXES, HIDDEN_AXES), scales


def _run_layers(
    step: prefetched_layers.Step,
    layers: Any,
    config: GLMConfig,
    x: Array,
    shared: Any,
    remat: str,
) -> tuple[Array, Array]:
    if remat == "blocks" and prefetched_layers.suits(layers, config):
        return prefetched_layers.scan(step, config, layers, x, shared)
    run = lambda x, layer, index: step(x, layer, index, shared)
    if remat != "none":
        is_apart = as_layers(layers).is_apart
        run = jax.checkpoint(run, policy=_policy(remat), prevent_cse=is_apart)
    return as_layers(layers).scan(run, x)


def _policy(remat: str) -> Any:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=_SAVED.get(remat, ()),
        names_which_can_be_offloaded=_OFFLOADED.get(remat, ()),
        offload_src=DEVICE_MEMORY,
        offload_dst=HOST_MEMORY,
    )


def whole_table(table: Float[Array, "vocab embed"], dtype: Any) -> Float[Array, "vocab embed"]:
    """Return a word embedding cast, and then gathered, so that each device has whole rows."""
    return constrain(constrain_parameters(table.astype(dtype), TABLE_AXES), TABLE_AXES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@jax.named_scope("embedding")
def embed_rows(
    table: Float[Array, "vocab embed"], tokens: Int[Array, "batch seq"], dtype: str
) -> Float[Array, "batch seq embed"]:
    """Take rows of a table. Those of a token that is often there are summed in the table's dtype,
    as a sum of thousands in bfloat16 would stand still."""
    return constrain(whole_table(table, dtype)[tokens], HIDDEN_AXES)


@jax.named_scope("embedding")
def _embed_backward(dtype: str, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, tokens = saved
    start = constrain(jnp.zeros_like(table), TABLE_AXES)
    summed = start.at[tokens].add(constrain(gradient, HIDDEN_AXES).astype(table.dtype))
    return constrain_parameters(constrain(summed, TABLE_AXES), TABLE_AXES), None


embed_rows.defvjp(
    lambda table, tokens, dtype: (embed_rows(table, tokens, dtype), (table, tokens)),
    _embed_backward,
)
