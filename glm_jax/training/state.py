"""The train state: its shapes and shardings, and its two forms, in steps and in checkpoints.

A checkpoint has layers stacked, whatever mesh saved it. A step takes layers apart where that
compiles in a few minutes and saves copies (`abstract_state`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from glm_jax.config import GLMConfig
from glm_jax.model.layer_stacks import (
    apart,
    as_layers,
    described_apart,
    stack_layers,
    transposed,
    unstack_layers,
)
from glm_jax.model.params import Adapters, GLMParams
from glm_jax.model.streamed_layers import DEVICE_MEMORY, HOST_MEMORY, is_streamed
from glm_jax.sharding import fitting_sharding, is_cpu, replicated
from glm_jax.training import trained_params
from glm_jax.training.optimizer import make_optimizer
from glm_jax.training.quantized_moments import QuantizedMoment
from glm_jax.training.recipe import Recipe
from glm_jax.training.stability import Monitor, init_monitor
from glm_jax.training.trained_params import TrainedParams
from glm_jax.training.update import BlockMoments, init_moments, without_layers

_MAX_LAYERS_APART = 40  # compiling takes 44 s of a core on a GPU, with 70 96, see docs/training.md


@struct.dataclass
class TrainBatch:
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
    """All that a step changes; arrays, or what describes them.

    Attributes:
      step: int32 [], number of updates.
      samples: int32 [], number of rows in these updates.
      params: the trained parameters; `abstract_state` says whether layers are stacked.
      opt_state: optax's, sharded as the parameters are.
      monitor: statistics of recent steps, by which a step is judged.
    """

    step: Any
    samples: Any
    params: TrainedParams
    opt_state: Any
    monitor: Monitor


def init_state(config: GLMConfig, recipe: Recipe, key: PRNGKeyArray, mesh: Mesh) -> TrainState:
    """Make a state with fresh parameters on the mesh, and optimiser state sharded as they are."""
    return start_state(trained_params.init(config, recipe, key, mesh), config, recipe, mesh)


def start_state(params: Any, config: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Make the state of a run that begins with the given parameters."""
    target = abstract_state(config, recipe, mesh)
    offloaded = None
    if recipe.offload_moments:
        # Never on the devices, which may have no room for them.
        offloaded = jax.tree.map(_zeros, target.opt_state.layers)
        target = _with_layer_moments(target, ())
    shardings = jax.tree.map(lambda a: a.sharding, target)

    def begin(params: TrainedParams) -> TrainState:
        if isinstance(params, GLMParams):
            params = stack_layers(params)
        state = _new_state(_own(params, mesh), config, recipe)
        if offloaded is not None:
            state = _with_layer_moments(state, ())
        return _lay_out(state, target)

    state = jax.jit(begin, out_shardings=shardings)(params)
    return state if offloaded is None else _with_layer_moments(state, offloaded)


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Make the initial value of a moment, zeros for every optimiser here, in its own memory."""
    sharding: Any = leaf.sharding
    shard = np.zeros(sharding.shard_shape(leaf.shape), leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda _: shard)


def _with_layer_moments(state: TrainState, layers: Any) -> TrainState:
    return dataclasses.replace(state, opt_state=dataclasses.replace(state.opt_state, layers=layers))


def _own(tree: Any, mesh: Mesh) -> Any:
    """Copy arrays into buffers that jax owns, as donation to a step requires.

    On CPU an array may alias memory of another owner.
    """
    return jax.tree.map(jnp.copy, tree) if is_cpu(mesh) else tree


def _new_state(params: TrainedParams, config: GLMConfig, recipe: Recipe) -> TrainState:
    """Make a state before its first step; layers stacked."""
    decays = trained_params.decay_mask(config, recipe, is_stacked=True)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        samples=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=init_moments(params, recipe, decays),
        monitor=init_monitor(recipe),
    )


def abstract_state(config: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Return shapes, dtypes and shardings of the state that steps take and return.

    The layers of a whole model are a tuple if `_takes_apart` says so: a loop over a stack
    copies weights out of it and gradients into it, and what the backward pass takes into stacks
    and out of them. Otherwise they are stacked, as in `abstract_saved_state`.
    """
    saved = abstract_saved_state(config, recipe, mesh)
    return _map_params(described_apart, saved) if _takes_apart(config, recipe, mesh) else saved


def _takes_apart(config: GLMConfig, recipe: Recipe, mesh: Mesh) -> bool:
    """Return True where the trained layers are a tuple; adapters never are, nor layers whose
    results wait on hosts: unrolled, XLA fetches all of them before the backward pass begins."""
    if recipe.adapter is not None or recipe.updates_by_block:
        return False
    return takes_layers_apart(config, mesh) and (is_cpu(mesh) or recipe.remat != "offload")


def takes_layers_apart(config: GLMConfig, mesh: Mesh) -> bool:
    """Return True where a step takes a model's layers, trained or frozen, as a tuple.

    That is for models whose step then compiles in a few minutes, and not on TPUs, whose compiler
    fuses slices into products.
    """
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    return is_cpu(mesh) or (config.num_layers <= _MAX_LAYERS_APART and not is_tpu)


def saved_form(state: TrainState) -> TrainState:
    """Return a state in the form that `abstract_saved_state` describes."""
    if is_stacked(state):
        return state
    return _stacked(state) if is_cpu(_mesh(state)) else _map_params(_to_hosts, state)


def is_stacked(state: TrainState) -> bool:
    """Return True for a state, or its description, whose layers are stacked."""
    return isinstance(state.params, Adapters) or not as_layers(state.params.layers).is_apart


def _mesh(state: TrainState) -> Mesh:
    return state.step.sharding.mesh


@jax.jit
def _stacked(state: TrainState) -> TrainState:
    return _map_params(stack_layers, state)


def _to_hosts(params: GLMParams) -> GLMParams:
    """Stack layers in hosts' memory, one array after another: devices have no room for more."""

    def stack(*parts: jax.Array) -> jax.Array:
        whole = _stack(parts)
        on_host = whole.sharding.with_memory_kind(HOST_MEMORY)
        return jax.block_until_ready(jax.device_put(whole, on_host))

    return dataclasses.replace(params, layers=jax.tree.map(stack, *params.layers))


_stack = jax.jit(jnp.stack)


def _from_hosts(params: GLMParams) -> GLMParams:
    """Invert `_to_hosts`."""

    def split(stack: jax.Array) -> tuple[jax.Array, ...]:
        on_device = jax.device_put(stack, stack.sharding.with_memory_kind(DEVICE_MEMORY))
        return jax.block_until_ready(apart(on_device))

    columns = jax.tree.map(split, params.layers)
    return dataclasses.replace(params, layers=transposed(columns, len(as_layers(params.layers))))


def step_form(saved: TrainState, target: TrainState) -> TrainState:
    """Return a saved state, in buffers of its own, in the form that steps take.

    Args:
      target: see `abstract_state`.
    """
    shardings = jax.tree.map(lambda a: a.sharding, target)
    mesh = _mesh(target)
    if not (is_stacked(target) or is_cpu(mesh)):
        return jax.device_put(_map_params(_from_hosts, saved), shardings)
    # Donated where jax owns it: a device has no room for it twice.
    donated = () if is_cpu(mesh) else (0,)
    lay_out = jax.jit(
        lambda saved: _lay_out(_own(saved, mesh), target),
        donate_argnums=donated,
        out_shardings=shardings,
    )
    return lay_out(saved)


def _lay_out(state: TrainState, target: TrainState) -> TrainState:
    return _map_params(stack_layers if is_stacked(target) else unstack_layers, state)


def _map_params(function: Callable[[GLMParams], GLMParams], state: TrainState) -> TrainState:
    """Apply a function to the parameters and to the optimiser's trees in their form.

    Moments of the embedding and the final layernorm alone have no layers to change.
    """
    is_params = lambda node: isinstance(node, GLMParams) and node.layers is not None
    change = lambda node: function(node) if is_params(node) else node
    return jax.tree.map(change, state, is_leaf=is_params)


def abstract_saved_state(config: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Return shapes, dtypes and shardings of a state in a checkpoint.

    Layers are stacked, in hosts' memory where steps run on other devices and take layers apart.
    """
    params: Any = trained_params.abstract(config, recipe, mesh)
    shapes = jax.eval_shape(lambda params: _new_state(params, config, recipe), params)
    if _takes_apart(config, recipe, mesh) and not is_cpu(mesh):
        params = dataclasses.replace(params, layers=jax.tree.map(_on_host, params.layers))
    decays = trained_params.decay_mask(config, recipe, is_stacked=True)
    moments = _place_moments(shapes.opt_state, params, recipe, decays)
    scalars = jax.tree.map(lambda leaf: _placed(leaf, replicated(mesh)), shapes)
    return dataclasses.replace(scalars, params=params, opt_state=moments)


def _place_moments(moments: Any, params: Any, recipe: Recipe, decays: Any) -> Any:
    """Describe the optimiser's state with each moment sharded as its parameter is."""
    if not isinstance(moments, BlockMoments):
        return _like_params(make_optimizer(recipe, decays), moments, params)
    rest_optimizer = make_optimizer(recipe, without_layers(decays))
    layers = _like_params(make_optimizer(recipe, decays.layers), moments.layers, params.layers)
    if recipe.offload_moments:
        layers = jax.tree.map(lambda x: _on_host(x) if is_streamed(x) else x, layers)
    return BlockMoments(layers, _like_params(rest_optimizer, moments.rest, without_layers(params)))


def _like_params(optimizer: optax.GradientTransformation, moments: Any, params: Any) -> Any:
    mesh = jax.tree.leaves(params)[0].sharding.mesh

    def place(moment: Any, param: Any) -> Any:
        # A quantised moment's scales have a shape of their own.
        fit = lambda leaf: _placed(leaf, fitting_sharding(param.sharding, leaf.shape))
        return jax.tree.map(fit, moment)

    return optax.tree_utils.tree_map_params(
        optimizer,
        place,
        moments,
        params,
        transform_non_params=lambda leaf: _placed(leaf, replicated(mesh)),
        is_leaf=lambda node: isinstance(node, QuantizedMoment),
    )


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _on_host(leaf: Any) -> jax.ShapeDtypeStruct:
    return _placed(leaf, leaf.sharding.with_memory_kind(HOST_MEMORY))


def state_shardings(config: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Return the shardings of the state that a step returns.

    Also over devices that are described for compiling alone, whose arrays lose their memory kind.
    """
    state = abstract_state(config, recipe, mesh)
    if not recipe.offload_moments:
        return jax.tree.map(lambda leaf: leaf.sharding, state)

    def named(leaf: Any, kind: str = DEVICE_MEMORY) -> NamedSharding:
        return NamedSharding(mesh.abstract_mesh, leaf.sharding.spec, memory_kind=kind)

    offloaded = jax.tree.map(
        lambda leaf: named(leaf, HOST_MEMORY if is_streamed(leaf) else DEVICE_MEMORY),
        state.opt_state.layers,
    )
    return _with_layer_moments(jax.tree.map(named, state), offloaded)
