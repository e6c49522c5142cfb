"""What a training step takes and gives."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from glm_jax.config import GLMConfig
from glm_jax.model import params as glm_params
from glm_jax.model.params import GLMParams
from glm_jax.training.optimizer import make_optimizer
from glm_jax.training.recipe import Recipe
from glm_jax.training.stability import Monitor, init_monitor


@struct.dataclass
class Batch:
    """Packed samples; see `data.pipeline.Batches`. A step takes [accumulation, batch, seq]."""

    tokens: Int32[Array, "*accumulation batch seq"]
    targets: Int32[Array, "*accumulation batch seq"]
    loss_weights: Float[Array, "*accumulation batch seq"]
    position_ids: Int32[Array, "*accumulation batch seq"]
    context_length: Int32[Array, "*accumulation batch seq"]
    segment_ids: Int32[Array, "*accumulation batch seq"]
    groups: Int32[Array, "*accumulation batch seq"]


@struct.dataclass
class TrainState:
    """All that a run changes, but for its place in the data.

    Attributes:
      step: updates that were made, int32 [].
      samples: rows that they were made of, int32 [].
      params: float, layers stacked.
      opt_state: optax's, sharded as the parameters are.
      monitor: what steps are held against.
    """

    step: Any  # arrays, or what describes them
    samples: Any
    params: GLMParams
    opt_state: Any
    monitor: Monitor


def init_state(config: GLMConfig, recipe: Recipe, key: PRNGKeyArray, mesh: Mesh) -> TrainState:
    """Fresh parameters on the mesh, and optimiser state sharded as they are."""
    target = abstract_state(config, recipe, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, target)

    def rest(params: GLMParams) -> TrainState:
        return _state(params, recipe)

    params = glm_params.init(config, key, mesh)
    return jax.jit(rest, out_shardings=shardings, donate_argnums=0)(params)


def _state(params: GLMParams, recipe: Recipe) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        samples=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(recipe).init(params),
        monitor=init_monitor(recipe),
    )


def abstract_state(config: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state that does not exist yet."""
    params = glm_params.abstract(config, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    by_path = {
        _names(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        # Moments stand under the parameter's own path, behind the optimiser's.
        names = _names(path)
        matches = (by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=next(matches, whole))

    shapes = jax.eval_shape(lambda params: _state(params, recipe), params)
    state: TrainState = jax.tree_util.tree_map_with_path(place, shapes)
    return state


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
