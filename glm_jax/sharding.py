"""The device mesh, and which mesh axis each logical axis of an array is sharded over.

Only this module knows the mesh axes. All others name logical axes: batch, seq, embed, heads,
head_dim, mlp, vocab, layers, group.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax.linen import spmd
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from glm_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
LogicalAxes = tuple[str | None, ...]

PARAMETER_RULES = (
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    ("head_dim", None),
    ("layers", None),
    ("group", None),
)
_GATHERED_AXIS = MESH_AXES[1]
# The embed axis of activations is not sharded: fsdp shards parameters and, like data, the batch.
_BATCH_AXES = ("data", "fsdp")
ACTIVATION_RULES = (
    ("batch", _BATCH_AXES),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", None),
    ("seq", None),
    ("saved_seq", "tensor"),  # of a block's input, which the backward pass finds saved
    ("head_dim", None),
    ("layers", None),
)


class MeshError(UserError):
    """A mesh that does not fit the devices or the model's shapes."""


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with axes (data, fsdp, tensor).

    Args:
      shape: sizes of the three axes; one may be -1, for all remaining devices.
      devices: the devices to use, all by default; a smaller mesh uses the first ones.

    Raises:
      MeshError: `shape` is not three sizes, or asks for more devices than there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = list(shape)
    if len(sizes) != 3 or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise MeshError(
            f"mesh {tuple(shape)}: give three positive sizes for {MESH_AXES}, one may be -1"
        )
    if -1 in sizes:
        known = -sizes[0] * sizes[1] * sizes[2]
        if len(devices) % known:
            raise MeshError(f"mesh {tuple(shape)}: {len(devices)} devices do not divide by {known}")
        sizes[sizes.index(-1)] = len(devices) // known
    count = sizes[0] * sizes[1] * sizes[2]
    if count > len(devices):
        hint = ""
        if devices[0].platform == "cpu":
            hint = f"; JAX_NUM_CPU_DEVICES={count} in the environment makes virtual ones, to try it"
        raise MeshError(
            f"mesh {tuple(shape)} needs {count} devices, there are {len(devices)}{hint}"
        )
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count]
    )


def parse_mesh(text: str) -> Mesh:
    """Make a mesh from a flag such as "1,1,8" (data, fsdp, tensor).

    Raises:
      MeshError: the text is not three integers, or see `make_mesh`.
    """
    return make_mesh(_parse_sizes(text))


def _parse_sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError as error:
        raise MeshError(f"mesh {text!r}: give three integers, such as 1,1,8") from error


def parse_replica_mesh(text: str, processes: int) -> Mesh | None:
    """Make the mesh of one process that runs a replica of the model on its own devices.

    Args:
      text: the mesh of all processes together; see `parse_mesh`.
      processes: number of processes.

    Returns:
      A mesh of local devices, or None if the data axis does not divide by the processes: then
      they run one model together.
    """
    data, *rest = sizes = _parse_sizes(text)
    if len(sizes) != 3:
        return None  # `make_mesh` reports what is wrong
    if data == -1:
        alone = len(jax.local_devices()) % math.prod(rest) == 0
    else:
        alone = data % processes == 0
        data //= processes
    return make_mesh((data, *rest), jax.local_devices()) if alone else None


def parameter_spec(
    mesh_shape: Mapping[str, int], axes: LogicalAxes, shape: Sequence[int]
) -> PartitionSpec:
    """Return the mesh axes of a parameter. An axis that fsdp does not divide is not sharded.

    Args:
      mesh_shape: sizes of the mesh axes by name.

    Raises:
      MeshError: the tensor axis does not divide an axis. An unsharded axis would hide that every
        device then holds the whole array.
    """
    spec = list(spmd.logical_to_mesh_axes(axes, PARAMETER_RULES) or ())
    for i, mesh_axis in enumerate(spec):
        if mesh_axis is None or shape[i] % mesh_shape[mesh_axis] == 0:
            continue
        if mesh_axis == "tensor":
            raise MeshError(
                f"{axes[i]}={shape[i]} does not divide by the tensor axis of "
                f"{mesh_shape['tensor']} devices"
            )
        spec[i] = None
    return PartitionSpec(*spec)


def parameter_sharding(mesh: Mesh, axes: LogicalAxes, shape: Sequence[int]) -> NamedSharding:
    """Return the sharding of a parameter; see `parameter_spec`."""
    return NamedSharding(mesh, parameter_spec(mesh.shape, axes, shape))


def activation_spec(axes: LogicalAxes) -> PartitionSpec:
    """Return the mesh axes of an activation."""
    spec = spmd.logical_to_mesh_axes(axes, ACTIVATION_RULES)
    return PartitionSpec(*(spec or ()))


def activation_sharding(mesh: Mesh, axes: LogicalAxes) -> NamedSharding:
    """Return the sharding of an activation."""
    return NamedSharding(mesh, activation_spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def fitting_sharding(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """Return a parameter's sharding, in its memory, for an array that is derived from it.

    Axes that the mesh does not divide are not sharded; an array with fewer axes is replicated.

    Args:
      shape: of the derived array, such as the scales of quantised moments.
    """
    sizes = sharding.mesh.shape
    fits = lambda axis, size: axis is None or size % sizes[axis] == 0
    axes = [a if fits(a, n) else None for a, n in zip(sharding.spec, shape, strict=False)]
    spec = PartitionSpec() if len(sharding.spec) > len(shape) else PartitionSpec(*axes)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def row_shards(mesh: Mesh | None) -> int:
    """Return the number of parts that the batch axis is sharded into, 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in _BATCH_AXES)


def is_cpu(mesh: Mesh) -> bool:
    """Return True for a mesh of CPU devices."""
    return bool(mesh.devices.flat[0].platform == "cpu")


def is_for_cpu() -> bool:
    """Return True while tracing for CPU: for the surrounding mesh, else the default device."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() == "cpu" if described is None else described.device_kind == "cpu"


def surrounding_mesh() -> AbstractMesh | None:
    """Return the mesh of the surrounding `jax.set_mesh`, or None.

    None also for a mesh of one device, whose programs are those of a single device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.size > 1 else None


def mesh_to_divide() -> AbstractMesh | None:
    """Return `surrounding_mesh`, or None inside `jax.shard_map`, where arrays are one device's."""
    mesh = surrounding_mesh()
    return None if mesh is None or mesh.manual_axes else mesh


def rows_of_a_device(rows: int) -> int:
    """Return how many of a batch's rows each device has under the surrounding mesh."""
    mesh = surrounding_mesh()
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in _BATCH_AXES)
    return rows // parts if rows % parts == 0 else rows


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Constrain the sharding of an activation under the surrounding mesh, if there is one."""
    if surrounding_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_activation_spec(x.shape, axes))


# Each of the next two is the other's gradient. `constrain` alone would give the gradient the
# sharding of the result: a sum over devices that is then divided, instead of one that is scattered.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, axes: LogicalAxes, gathered: LogicalAxes) -> jax.Array:
    """Gather an activation that is sharded as `axes` say to the sharding of `gathered`, in its own
    dtype: the compiler may move no cast behind the collective."""
    return constrain(constrain(x, axes), gathered)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def scatter(x: jax.Array, axes: LogicalAxes, gathered: LogicalAxes) -> jax.Array:
    """Invert `gather`; the parts of a sum that devices have are summed as they are scattered."""
    return constrain(x, axes)


def _plain(function: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, None]]:
    return lambda x, *axes: (function(x, *axes), None)


gather.defvjp(_plain(gather), lambda *rest: (scatter(rest[-1], *rest[:2]),))
scatter.defvjp(_plain(scatter), lambda *rest: (gather(rest[-1], *rest[:2]),))


def constrain_parameters(tree: Any, axes: Any) -> Any:
    """Constrain a tree of arrays to the shardings of the parameters whose shapes they have.

    Args:
      axes: logical axes of each leaf, in a tree of the same structure.
    """
    mesh = surrounding_mesh()
    if mesh is None:
        return tree

    def pin(x: jax.Array, of_leaf: LogicalAxes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, parameter_spec(mesh.shape, of_leaf, x.shape))

    return jax.tree.map(pin, tree, axes)


def gather_parameters(tree: Any, axes: Any) -> Any:
    """Gather parameters over fsdp, each in its own dtype; over tensor they stay divided.

    Args:
      axes: see `constrain_parameters`.
    """
    mesh = surrounding_mesh()
    if mesh is None:
        return tree

    def gathered(x: jax.Array, of_leaf: LogicalAxes) -> jax.Array:
        spec = parameter_spec(mesh.shape, of_leaf, x.shape)
        whole = PartitionSpec(*(None if axis == _GATHERED_AXIS else axis for axis in spec))
        return jax.lax.with_sharding_constraint(x, whole)

    return jax.tree.map(gathered, constrain_parameters(tree, axes), axes)


def parameters_are_divided() -> bool:
    """Return whether weights are gathered before they are used, under the surrounding mesh."""
    mesh = surrounding_mesh()
    return mesh is not None and mesh.shape[_GATHERED_AXIS] > 1


def fitting_activation_spec(shape: Sequence[int], axes: LogicalAxes) -> PartitionSpec:
    """Return `activation_spec` without mesh axes of the surrounding mesh that do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = list(activation_spec(axes))
    for i, mesh_axes in enumerate(spec):
        names = (mesh_axes,) if isinstance(mesh_axes, str) else (mesh_axes or ())
        if shape[i] % math.prod(mesh.shape[name] for name in names):
            spec[i] = None
    return PartitionSpec(*spec)


def data_axis(rows: int) -> str | None:
    """Return the data axis of the surrounding mesh if it divides the rows, else None.

    For products of weights that fsdp shards: their rows are sharded over data alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    name = _BATCH_AXES[0]
    return name if name in mesh.shape and rows % mesh.shape[name] == 0 else None


def per_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Return `jax.shard_map` of a function over the surrounding mesh.

    Unchecked as to which results vary over which mesh axes: kernels do not declare it.
    """
    run: Any = jax.shard_map
    return run(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which programs run on a mesh, or on one device if it is None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh that the arrays of a tree are sharded over, None for a single device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None
