"""The optimiser's update: of all parameters at once, or one block after another.

Block by block, moments can stay in hosts' memory and be copied to the devices for one block at a
time: then the devices hold the moments of two blocks at most.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from glm_jax.model.params import GLMParams
from glm_jax.model.streamed_layers import fetch, is_streamed
from glm_jax.training.optimizer import apply_updates, make_optimizer
from glm_jax.training.recipe import Recipe


@struct.dataclass
class BlockMoments:
    """The state of one optimiser for each block and one for the rest.

    Attributes:
      layers: of the blocks, stacked; if offloaded, arrays with more than a row for each block are
        in hosts' memory.
      rest: of the embedding and the final layernorm, on the devices.
    """

    layers: Any
    rest: Any


def init_moments(params: Any, recipe: Recipe, decays: Any) -> Any:
    """Return the optimiser's state before the first step, all zeros.

    Args:
      params: layers stacked.
      decays: see `make_optimizer`.
    """
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)  # the dtype of moments
    if not recipe.updates_by_block:
        return make_optimizer(recipe, decays).init(params)
    rest = make_optimizer(recipe, without_layers(decays)).init(without_layers(params))
    return BlockMoments(jax.vmap(make_optimizer(recipe, decays.layers).init)(params.layers), rest)


def without_layers(params: GLMParams) -> GLMParams:
    """Return a tree of the embedding and the final layernorm alone."""
    return dataclasses.replace(params, layers=None)


@dataclasses.dataclass(frozen=True)
class Step:
    """Scalars of one step that all parameters share.

    Attributes:
      factor: multiplies gradients, to clip them and to remove the loss scale.
      rate: learning rate.
      is_good: False to leave parameters and moments unchanged.
      key: for stochastic rounding of bfloat16 parameters.
    """

    factor: Float[Array, ""]
    rate: Float[Array, ""]
    is_good: Bool[Array, ""]
    key: PRNGKeyArray

    def of_part(self, number: int | Array) -> "Step":
        """Return the scalars for part `number` of the model, with a key of its own."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))


def update(
    params: Any, gradients: Any, moments: Any, recipe: Recipe, decays: Any, step: Step
) -> tuple[Any, Any, Float[Array, ""]]:
    """Return the next parameters and moments, and the norm of the update.

    Args:
      moments: the optimiser's state; see `init_moments`.
      decays: see `make_optimizer`.
    """
    if isinstance(moments, BlockMoments):
        return _update_by_block(params, gradients, moments, recipe, decays, step)
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * step.factor, gradients)
    updates, after = make_optimizer(recipe, decays).update(gradients, moments, params)
    updates = jax.tree.map(lambda u: -step.rate * u, updates)
    moved = apply_updates(params, updates, step.key)
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(step.is_good, new, old), (moved, after), (params, moments)
    )
    return params, moments, optax.global_norm(updates)


def _update_by_block(
    params: GLMParams,
    gradients: GLMParams,
    moments: BlockMoments,
    recipe: Recipe,
    decays: GLMParams,
    step: Step,
) -> tuple[GLMParams, BlockMoments, Array]:
    # Each part is updated as if it were the whole model.
    rest, rest_moments, norm = update(
        without_layers(params),
        without_layers(gradients),
        moments.rest,
        recipe,
        without_layers(decays),
        step.of_part(0),
    )
    layers: Any = params.layers

    def one(index: Array, carry: Any) -> Any:
        layers, offloaded, squares = carry
        take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        layer, gradient = (jax.tree.map(take, stack) for stack in (layers, gradients.layers))
        of_layer = fetch(offloaded, index)
        part = step.of_part(1 + index)
        moved, after, norm = update(layer, gradient, of_layer, recipe, decays.layers, part)

        def put(stack: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(stack, new, index, 0)

        def put_back(stack: Array, new: Array) -> Array:
            if recipe.offload_moments and is_streamed(stack):
                new = jax.device_put(new, jax.memory.Space.Host)
            return put(stack, new)

        layers = jax.tree.map(put, layers, moved)
        return layers, jax.tree.map(put_back, offloaded, after), squares + norm**2

    count = layers.input_layernorm.scale.shape[0]
    start = (layers, moments.layers, norm**2)
    layers, offloaded, squares = jax.lax.fori_loop(0, count, one, start)
    return (
        dataclasses.replace(rest, layers=layers),
        BlockMoments(offloaded, rest_moments),
        jnp.sqrt(squares),
    )
