"""What a training step takes and gives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
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
from glm_jax.sharding import is_cpu
from glm_jax.training import trainable
from glm_jax.training.recipe import Recipe
from glm_jax.training.stability import Monitor, init_monitor
from glm_jax.training.trainable import Trainable
from glm_jax.training.update import BlockMoments, init_moments

_MOST_APART = 40  # layers; a step takes some 3.6 s of a core to compile for each


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
      params: what is trained; layers as `abstract_state` says.
      opt_state: optax's, sharded as the parameters are.
      monitor: what steps are held against.
    """

    step: Any  # arrays, or what describes them
    samples: Any
    params: Trainable
    opt_state: Any
    monitor: Monitor


def init_state(config: GLMConfig, recipe: Recipe, key: PRNGKeyArray, mesh: Mesh) -> TrainState:
    """Fresh parameters on the mesh, and optimiser state sharded as they are."""
    return start_state(trainable.init(config, recipe, key, mesh), config, recipe, mesh)


def start_state(params: Any, config: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """The state of a run that begins with given parameters."""
    target = abstract_state(config, recipe, mesh)
    waiting = None
    if recipe.offload_moments:
        # Never on the devices, which may have no room for them.
        waiting = jax.tree.map(_zeros, target.opt_state.layers)
        target = _without_waiting(target)
    shardings = jax.tree.map(lambda a: a.sharding, target)

    def begin(params: Trainable) -> TrainState:
        if isinstance(params, GLMParams):
            params = stack_layers(params)
        state = _state(_own(params, mesh), recipe)
        return _lay_out(state if waiting is None else _without_waiting(state), target)

    state: TrainState = jax.jit(begin, out_shardings=shardings)(params)
    if waiting is None:
        return state
    moments = state.opt_state.replace(layers=waiting)
    whole: TrainState = state.replace(opt_state=moments)  # type: ignore[attr-defined]
    return whole


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """What every optimiser here begins with, made in the memory where it stays."""
    sharding: Any = leaf.sharding
    piece = np.zeros(sharding.shard_shape(leaf.shape), leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda _: piece)


def _without_waiting(state: TrainState) -> TrainState:
    moments: BlockMoments = state.opt_state
    less: TrainState = state.replace(opt_state=moments.replace(layers=()))  # type: ignore[attr-defined]
    return less


def _own(tree: Any, mesh: Mesh) -> Any:
    """In buffers that belong to jax alone, as what is donated to a step must: a CPU's arrays
    may lie in memory of others."""
    return jax.tree.map(jnp.copy, tree) if is_cpu(mesh) else tree


def _state(params: Trainable, recipe: Recipe) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        samples=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=init_moments(params, recipe),
        monitor=init_monitor(recipe),
    )


def abstract_state(config: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state that steps take and give.

    The layers of a whole model are a tuple where `_takes_apart` says so: a loop over a stack
    copies weights out of it and gradients into it, and what the backward pass takes into stacks
    and out of them. Else they are stacked, as in `abstract_saved_state`.
    """
    saved = abstract_saved_state(config, recipe, mesh)
    return _map_params(described_apart, saved) if _takes_apart(config, recipe, mesh) else saved


def _takes_apart(config: GLMConfig, recipe: Recipe, mesh: Mesh) -> bool:
    """Whether layers are a tuple: of models whose step then compiles in a few minutes. Not on
    TPUs, whose compiler puts slices into products."""
    if recipe.adapter is not None or recipe.updates_by_block:
        return False
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    return is_cpu(mesh) or (config.num_layers <= _MOST_APART and not is_tpu)


def saved_form(state: TrainState) -> TrainState:
    """A state as `abstract_saved_state` describes it."""
    if is_stacked(state):
        return state
    return _stacked(state) if is_cpu(_mesh(state)) else _map_params(_to_hosts, state)


def is_stacked(state: TrainState) -> bool:
    """Whether its layers are, or what describes them."""
    return isinstance(state.params, Adapters) or not as_layers(state.params.layers).is_apart


def _mesh(state: TrainState) -> Mesh:
    mesh: Mesh = state.step.sharding.mesh
    return mesh


@jax.jit
def _stacked(state: TrainState) -> TrainState:
    return _map_params(stack_layers, state)


def _to_hosts(params: GLMParams) -> GLMParams:
    """Layers stacked in hosts' memory, one array after another: devices have room for no more."""

    def stack(*parts: jax.Array) -> jax.Array:
        whole = _stack(parts)
        place = whole.sharding.with_memory_kind(HOST_MEMORY)
        return jax.block_until_ready(jax.device_put(whole, place))

    stacked: GLMParams = params.replace(  # type: ignore[attr-defined]
        layers=jax.tree.map(stack, *params.layers)
    )
    return stacked


_stack = jax.jit(jnp.stack)


def _from_hosts(params: GLMParams) -> GLMParams:
    """The reverse of `_to_hosts`."""

    def split(stack: jax.Array) -> tuple[jax.Array, ...]:
        here = jax.device_put(stack, stack.sharding.with_memory_kind(DEVICE_MEMORY))
        return jax.block_until_ready(apart(here))

    columns = jax.tree.map(split, params.layers)
    split_up: GLMParams = params.replace(  # type: ignore[attr-defined]
        layers=transposed(columns, len(as_layers(params.layers)))
    )
    return split_up


def step_form(saved: TrainState, target: TrainState) -> TrainState:
    """A saved state, in buffers of its own, as `abstract_state` describes it in `target`."""
    shardings = jax.tree.map(lambda a: a.sharding, target)
    mesh = _mesh(target)
    if not (is_stacked(target) or is_cpu(mesh)):
        here: TrainState = jax.device_put(_map_params(_from_hosts, saved), shardings)
        return here
    # Given up where it is jax's own: a device has no room for it twice.
    given_up = () if is_cpu(mesh) else (0,)
    lay_out = jax.jit(
        lambda saved: _lay_out(_own(saved, mesh), target),
        donate_argnums=given_up,
        out_shardings=shardings,
    )
    state: TrainState = lay_out(saved)
    return state


def _lay_out(state: TrainState, target: TrainState) -> TrainState:
    return _map_params(stack_layers if is_stacked(target) else unstack_layers, state)


def _map_params(function: Callable[[GLMParams], GLMParams], state: TrainState) -> TrainState:
    """Changes the parameters and what the optimiser holds in their form."""
    is_params = lambda node: isinstance(node, GLMParams)
    change = lambda node: function(node) if is_params(node) else node
    changed: TrainState = jax.tree.map(change, state, is_leaf=is_params)
    return changed


def abstract_saved_state(config: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state in a checkpoint: layers are stacked, in hosts'
    memory where steps run on other devices and take layers apart."""
    params = trainable.abstract(config, recipe, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    is_away = _takes_apart(config, recipe, mesh) and not is_cpu(mesh)
    by_path: dict[tuple[str, ...], NamedSharding] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = _names(path)
        # Where each block has an optimiser of its own, its parameters' paths begin there.
        by_path |= {names: leaf.sharding, names[1:]: leaf.sharding}

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        # Moments stand under the parameter's own path, behind the optimiser's; parts of one
        # have a name after it.
        names = _names(path)
        ends = [part for i in range(len(names)) for part in (names[i:], names[i:-1])]
        matches = (by_path[part] for part in ends if part in by_path)
        sharding = _fitting(next(matches, whole), leaf.shape)
        if (is_away and "layers" in names) or (recipe.offload_moments and _is_waiting(names, leaf)):
            sharding = sharding.with_memory_kind(HOST_MEMORY)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.eval_shape(lambda params: _state(params, recipe), params)
    state: TrainState = jax.tree_util.tree_map_with_path(place, shapes)
    return state


def _is_waiting(names: tuple[str, ...], leaf: Any) -> bool:
    """Whether an array of a state lies in hosts' memory, where moments do."""
    return names[:2] == ("opt_state", "layers") and is_streamed(leaf)


def state_shardings(config: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Where a step leaves its state; also over devices that are compiled for without being
    here, whose arrays forget their memory."""
    state = abstract_state(config, recipe, mesh)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        place: NamedSharding = leaf.sharding
        if recipe.offload_moments:
            kind = HOST_MEMORY if _is_waiting(_names(path), leaf) else DEVICE_MEMORY
            return NamedSharding(mesh.abstract_mesh, place.spec, memory_kind=kind)
        return place

    shardings: TrainState = jax.tree_util.tree_map_with_path(sharding, state)
    return shardings


def _fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """A parameter's sharding for what the optimiser keeps of it, in the parameter's shape or
    a smaller one."""
    if len(sharding.spec) > len(shape):
        return NamedSharding(sharding.mesh, PartitionSpec())
    sizes = sharding.mesh.shape
    fits = lambda axis, size: axis is None or size % sizes[axis] == 0
    axes = [a if fits(a, n) else None for a, n in zip(sharding.spec, shape, strict=False)]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
