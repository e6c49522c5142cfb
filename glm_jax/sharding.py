"""The device mesh, and which logical axis of an array lies on which mesh axis.

This is the only place that knows mesh axes. Everything else names logical axes:
batch, seq, embed, heads, head_dim, mlp, vocab, layers, group.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
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
# Activations keep whole embeddings: fsdp splits parameters and, like data, the batch.
ACTIVATION_RULES = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", None),
    ("seq", None),
    ("head_dim", None),
    ("layers", None),
)


class MeshError(UserError):
    """A mesh that the devices or the model's shapes do not allow."""


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor).

    Args:
      shape: sizes of the three axes; one of them may be -1 and takes what is left.
      devices: the devices to use, all by default; when fewer are asked for than there
        are, the first ones.

    Raises:
      MeshError: not three sizes, or more devices asked for than there are.
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
        raise MeshError(f"mesh {tuple(shape)} needs {count} devices, there are {len(devices)}")
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count]
    )


def parse_mesh(text: str) -> Mesh:
    """A mesh from a flag such as "1,1,8" (data, fsdp, tensor).

    Raises:
      MeshError: the text is not three integers, or `make_mesh` refuses them.
    """
    return make_mesh(_parse_sizes(text))


def _parse_sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError as error:
        raise MeshError(f"mesh {text!r}: give three integers, such as 1,1,8") from error


def parse_replica_mesh(text: str, processes: int) -> Mesh | None:
    """The part of a mesh that a process has as a model of its own, on its own devices.

    Args:
      text: as of `parse_mesh`, of all processes together.

    Returns:
      A mesh of local devices, or None where data does not divide by the processes: they run
      one model together.
    """
    data, *rest = sizes = _parse_sizes(text)
    if len(sizes) != 3:
        return None  # `make_mesh` says what is wrong
    if data == -1:
        alone = len(jax.local_devices()) % math.prod(rest) == 0
    else:
        alone = data % processes == 0
        data //= processes
    return make_mesh((data, *rest), jax.local_devices()) if alone else None


def parameter_spec(
    mesh_shape: Mapping[str, int], axes: LogicalAxes, shape: Sequence[int]
) -> PartitionSpec:
    """The mesh axes of a parameter. An axis that its mesh axis does not divide stays whole.

    Raises:
      MeshError: a tensor-parallel axis does not divide (that must be said, not hidden:
        the model would be held once per device).
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
    """Where a parameter lives, by `parameter_spec`."""
    return NamedSharding(mesh, parameter_spec(mesh.shape, axes, shape))


def activation_spec(axes: LogicalAxes) -> PartitionSpec:
    """The mesh axes of an activation with the given logical axes."""
    spec = spmd.logical_to_mesh_axes(axes, ACTIVATION_RULES)
    return PartitionSpec(*(spec or ()))


def activation_sharding(mesh: Mesh, axes: LogicalAxes) -> NamedSharding:
    return NamedSharding(mesh, activation_spec(axes))


def is_cpu(mesh: Mesh) -> bool:
    """Whether a mesh's devices are CPUs."""
    return bool(mesh.devices.flat[0].platform == "cpu")


def is_for_cpu() -> bool:
    """Whether what is traced is for CPU: the surrounding mesh's devices, else the default."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() == "cpu" if described is None else described.device_kind == "cpu"


def surrounding_mesh() -> AbstractMesh | None:
    """The mesh of the surrounding `jax.set_mesh`; None where there is none, or where it has one
    device, on which programs are those of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.size > 1 else None


def mesh_to_divide() -> AbstractMesh | None:
    """`surrounding_mesh` where programs are still to be divided among its devices: None inside
    `jax.shard_map`, where each device has its own part already."""
    mesh = surrounding_mesh()
    return None if mesh is None or mesh.manual_axes else mesh


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Pins an activation to the mesh of the surrounding `jax.set_mesh`, if there is one."""
    if surrounding_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_activation_spec(x.shape, axes))


def constrain_parameters(tree: Any, axes: Any) -> Any:
    """Pins a tree of arrays shaped like parameters to where parameters live.

    Args:
      axes: logical axes of each leaf, in a tree of the same structure.
    """
    mesh = surrounding_mesh()
    if mesh is None:
        return tree

    def pin(x: jax.Array, of_leaf: LogicalAxes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, parameter_spec(mesh.shape, of_leaf, x.shape))

    return jax.tree.map(pin, tree, axes)


def fitting_activation_spec(shape: Sequence[int], axes: LogicalAxes) -> PartitionSpec:
    """`activation_spec` under the surrounding mesh, without the axes that don't divide."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = list(activation_spec(axes))
    for i, mesh_axes in enumerate(spec):
        names = (mesh_axes,) if isinstance(mesh_axes, str) else (mesh_axes or ())
        if shape[i] % math.prod(mesh.shape[name] for name in names):
            spec[i] = None
    return PartitionSpec(*spec)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Has programs run on a mesh, or on a single device where there is none."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a tree are sharded over, None for a single device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None
