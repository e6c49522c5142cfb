"""What a run trains, all parameters or adapters beside frozen ones, under one interface."""

from typing import Any

from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from glm_jax.config import GLMConfig
from glm_jax.model import adapters as model_adapters
from glm_jax.model import params as glm_params
from glm_jax.model.params import Adapters, GLMParams
from glm_jax.training.recipe import Recipe

Trainable = GLMParams | Adapters


def specs(config: GLMConfig, recipe: Recipe) -> Trainable:
    """`ParamSpec` leaves, layers stacked."""
    if recipe.adapter is not None:
        return model_adapters.specs(config, recipe.adapter)
    return glm_params.specs(config)


def abstract(config: GLMConfig, recipe: Recipe, mesh: Mesh) -> Trainable:
    """Shapes, dtypes and shardings, layers stacked."""
    tree: Trainable = glm_params.abstract_of(specs(config, recipe), mesh)
    return tree


def init(config: GLMConfig, recipe: Recipe, key: PRNGKeyArray, mesh: Mesh) -> Trainable:
    """Fresh ones, the same on every mesh."""
    made: Trainable = glm_params.init_of(specs(config, recipe), key, mesh)
    return made


def logical_axes(config: GLMConfig, recipe: Recipe, is_stacked: bool) -> Any:
    """The tree of each array's logical axes."""
    if is_stacked:
        return glm_params.axes_of(specs(config, recipe))
    return glm_params.logical_axes(config, is_stacked)


def whole_model(trained: Any, frozen: GLMParams | None, recipe: Recipe) -> GLMParams:
    """The model that is computed with: what is trained, with what is not."""
    if recipe.adapter is None:
        params: GLMParams = trained
        return params
    assert frozen is not None
    return model_adapters.attach(frozen, trained, recipe.adapter.scale)
