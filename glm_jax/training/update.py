"""From gradients to the next parameters, of all at once or a block at a time.

A block at a time, moments can wait in hosts' memory and come to the devices one block's after
the other: there they take the room of a block's.
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
    """The optimiser's state where blocks have one each.

    Attributes:
      layers: stacked; if offloaded, arrays of more than a row a block lie in hosts' memory.
      rest: of embedding and final layernorm, on the devices.
    """

    layers: Any
    rest: Any


def init_moments(params: Any, recipe: Recipe) -> Any:
    """The optimiser's state before the first step: zeros all through."""
    optimizer = make_optimizer(recipe)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)  # as their moments are
    if not recipe.updates_by_block:
        return optimizer.init(params)
    rest = optimizer.init(_rest(params))
    return BlockMoments(jax.vmap(optimizer.init)(params.layers), rest)


def _rest(params: GLMParams) -> GLMParams:
    rest: GLMParams = params.replace(layers=None)  # type: ignore[attr-defined]
    return rest


@dataclasses.dataclass(frozen=True)
class Step:
    """What all parameters share in a step.

    Attributes:
      factor: of gradients, which clips them and takes the loss scale out.
      rate: learning rate.
      is_good: where not, all stays as it was.
      key: of the rounding of bfloat16 parameters.
    """

    factor: Float[Array, ""]
    rate: Float[Array, ""]
    is_good: Bool[Array, ""]
    key: PRNGKeyArray

    def of_part(self, number: int | Array) -> "Step":
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))


def update(
    params: Any, gradients: Any, moments: Any, recipe: Recipe, step: Step
) -> tuple[Any, Any, Float[Array, ""]]:
    """The next parameters and moments, and the norm of what was added.

    Args:
      moments: what `init_moments` gave.
    """
    if isinstance(moments, BlockMoments):
        return _by_block(params, gradients, moments, recipe, step)
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * step.factor, gradients)
    updates, after = make_optimizer(recipe).update(gradients, moments, params)
    updates = jax.tree.map(lambda u: -step.rate * u, updates)
    moved = apply_updates(params, updates, step.key)
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(step.is_good, new, old), (moved, after), (params, moments)
    )
    return params, moments, optax.global_norm(updates)


def _by_block(
    params: GLMParams, gradients: GLMParams, moments: BlockMoments, recipe: Recipe, step: Step
) -> tuple[GLMParams, BlockMoments, Array]:
    # Each of them as if it were all of the model.
    rest, rest_moments, norm = update(
        _rest(params), _rest(gradients), moments.rest, recipe, step.of_part(0)
    )
    layers: Any = params.layers

    def one(index: Array, carry: Any) -> Any:
        layers, waiting, squares = carry
        take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        layer, gradient = (jax.tree.map(take, stack) for stack in (layers, gradients.layers))
        here = fetch(waiting, index)
        moved, after, norm = update(layer, gradient, here, recipe, step.of_part(1 + index))

        def put(stack: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(stack, new, index, 0)

        def put_back(stack: Array, new: Array) -> Array:
            if recipe.offload_moments and is_streamed(stack):
                new = jax.device_put(new, jax.memory.Space.Host)
            return put(stack, new)

        layers = jax.tree.map(put, layers, moved)
        return layers, jax.tree.map(put_back, waiting, after), squares + norm**2

    count = layers.input_layernorm.scale.shape[0]
    start = (layers, moments.layers, norm**2)
    layers, waiting, squares = jax.lax.fori_loop(0, count, one, start)
    moved = rest.replace(layers=layers)
    return moved, BlockMoments(waiting, rest_moments), jnp.sqrt(squares)
