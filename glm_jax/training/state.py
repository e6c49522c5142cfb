"""What a training step takes and gives."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from glm_jax.config import GLMConfig
from glm_jax.model import params as glm_params
from glm_jax.model.params import GLMParams


@struct.dataclass
class TrainState:
    """step counts the updates that were made."""

    step: Any  # int32 [], or what describes it
    params: GLMParams
    opt_state: Any


def init_state(
    config: GLMConfig, optimizer: optax.GradientTransformation, key: PRNGKeyArray, mesh: Mesh
) -> TrainState:
    """Fresh parameters on the mesh, and optimiser state sharded as they are."""
    params = glm_params.init(config, key, mesh)
    target = abstract_state(config, optimizer, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, target.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return TrainState(step=step, params=params, opt_state=opt_state)


def abstract_state(
    config: GLMConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
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

    opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(step=step, params=params, opt_state=opt_state)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
