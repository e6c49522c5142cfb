"""Which parameters a run trains: all of a model's, or adapters beside a frozen model.

Everything else that training knows of a parameter (shape, sharding, initial value, whether it
decays) is read from its `ParamSpec`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from glm_jax.config import GLMConfig
from glm_jax.model import adapters as model_adapters
from glm_jax.model import params as glm_params
from glm_jax.model.params import Adapters, GLMParams, ParamSpec
from glm_jax.training.recipe import Recipe

TrainedParams = GLMParams | Adapters


def specs(config: GLMConfig, recipe: Recipe, is_stacked: bool = True) -> TrainedParams:
    """Return the `ParamSpec` of each trained array.

    Args:
      is_stacked: False for a whole model whose layers are a tuple of blocks.
    """
    if recipe.adapter is not None:
        return model_adapters.specs(config, recipe.adapter)
    stacked = glm_params.specs(config)
    if is_stacked:
        return stacked
    layer = _map_specs(
        lambda spec: dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:]),
        stacked.layers,
    )
    return dataclasses.replace(stacked, layers=(layer,) * config.num_layers)


def _map_specs(function: Callable[[ParamSpec], Any], tree: Any) -> Any:
    return jax.tree.map(function, tree, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def abstract(config: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainedParams:
    """Return shapes, dtypes and shardings, layers stacked."""
    return glm_params.abstract_of(specs(config, recipe), mesh)


def init(config: GLMConfig, recipe: Recipe, key: PRNGKeyArray, mesh: Mesh) -> TrainedParams:
    """Draw initial values, layers stacked; the same on every mesh."""
    return glm_params.init_of(specs(config, recipe), key, mesh)


def logical_axes(config: GLMConfig, recipe: Recipe, is_stacked: bool) -> Any:
    """Return the tree of each array's logical axes; `is_stacked` as in `specs`."""
    return _map_specs(lambda spec: spec.axes, specs(config, recipe, is_stacked))


def decay_mask(config: GLMConfig, recipe: Recipe, is_stacked: bool) -> Any:
    """Return a tree of bools, True where weight decay applies; `is_stacked` as in `specs`."""
    return _map_specs(lambda spec: spec.decays, specs(config, recipe, is_stacked))


def whole_model(trained: Any, frozen: GLMParams | None, recipe: Recipe) -> GLMParams:
    """Return the model to compute with: the trained parameters, with the frozen ones if any."""
    if recipe.adapter is None:
        return trained
    assert frozen is not None
    return model_adapters.attach(frozen, trained, recipe.adapter.scale)
