"""Parameter trees: every array's shape, dtype, logical axes and initialiser.

Layers are stacked on a leading axis, the form that is stored, or a tuple of blocks apart, the
form that runs: `unstack_layers` and `stack_layers` turn one into the other.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from glm_jax.config import GLMConfig
from glm_jax.quantization import Scheme, quantize
from glm_jax.sharding import LogicalAxes, parameter_sharding

Initializer = Callable[[PRNGKeyArray, tuple[int, ...], Any], Float[Array, "..."]]


@struct.dataclass
class LayerNormParams:
    scale: Any
    bias: Any


@struct.dataclass
class LinearParams:
    """kernel: [inputs, *outputs], float, a QuantizedArray, or either in an AdaptedKernel;
    bias: [*outputs]."""

    kernel: Any
    bias: Any


@struct.dataclass
class LowRank:
    """A pair of matrices: down [inputs, rank], up [rank, *outputs]."""

    down: Any
    up: Any


@struct.dataclass
class Adapters:
    """Pairs by the linear's name, layers stacked as kernels are; see `model.adapters`."""

    pairs: dict[str, LowRank]


@struct.dataclass
class AdaptedKernel:
    """Stands for frozen + scale * down up, of which no one writes out the sum."""

    frozen: Any
    pair: LowRank
    scale: float = struct.field(pytree_node=False)


@struct.dataclass
class LayerParams:
    """One block, or all of them stacked on a leading `layers` axis.

    Attributes:
      query_key_value: kernel [embed, heads, 3, head_dim].
      dense: attention output, kernel [heads * head_dim, embed].
      dense_h_to_4h: the two halves (value, gate) of the GLU, kernel [embed, 2, mlp].
      dense_4h_to_h: kernel [mlp, embed].
    """

    input_layernorm: LayerNormParams
    query_key_value: LinearParams
    dense: LinearParams
    post_attention_layernorm: LayerNormParams
    dense_h_to_4h: LinearParams
    dense_4h_to_h: LinearParams


# Logical axes of each kernel, [inputs, *outputs].
KERNEL_AXES: dict[str, LogicalAxes] = {
    "query_key_value": ("embed", "heads", None, "head_dim"),
    "dense": ("heads", "embed"),
    "dense_h_to_4h": ("embed", None, "mlp"),
    "dense_4h_to_h": ("mlp", "embed"),
}
LINEAR_NAMES = tuple(KERNEL_AXES)


@struct.dataclass
class GLMParams:
    """The whole model.

    Attributes:
      word_embeddings: [vocab, embed], also the output projection; or, made ready for the
        CPU kernel, a `TiledArray` [embed, vocab].
      layers: stacked `LayerParams`, a tuple of them, or `OffloadedLayers`.
    """

    word_embeddings: Any
    layers: Any
    final_layernorm: LayerNormParams


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What one array is, before it exists."""

    shape: tuple[int, ...]
    dtype: str
    axes: LogicalAxes
    initializer: Initializer


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def constant(value: float) -> Initializer:
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def normal(stddev: float) -> Initializer:
    return lambda key, shape, dtype: (stddev * jax.random.normal(key, shape)).astype(dtype)


def _xavier(fan_in: int, fan_out: int, gain: float) -> Initializer:
    return normal(gain * math.sqrt(2.0 / (fan_in + fan_out)))


def _query_key_value(hidden: int, value_gain: float) -> Initializer:
    """Xavier normal for query and key, scaled for value (DeepNorm)."""

    def initializer(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
        kernel = _xavier(hidden, hidden, 1.0)(key, shape, jnp.float32)
        gain = jnp.array([1.0, 1.0, value_gain])[:, None]
        return (kernel * gain).astype(dtype)

    return initializer


def specs(config: GLMConfig) -> GLMParams:
    """The whole model as `ParamSpec` leaves, layers stacked.

    Initial values after DeepNorm (arXiv:2210.02414, section 2.1 and appendix): Xavier
    normal, scaled by (2 * layers)^-1/2 but for query and key; zero biases.
    """
    layers, hidden, inner = config.num_layers, config.hidden_size, config.inner_hidden_size
    heads, head_dim, dtype = config.num_heads, config.head_dim, config.param_dtype
    gain = (2.0 * layers) ** -0.5

    def layernorm(*stack: tuple[int, str]) -> LayerNormParams:
        shape = (*tuple(size for size, _ in stack), hidden)
        axes = (*tuple(axis for _, axis in stack), None)
        return LayerNormParams(
            scale=ParamSpec(shape, dtype, axes, constant(1.0)),
            bias=ParamSpec(shape, dtype, axes, constant(0.0)),
        )

    def linear(name: str, sizes: tuple[int, ...], initializer: Initializer) -> LinearParams:
        axes = KERNEL_AXES[name]
        return LinearParams(
            kernel=ParamSpec((layers, *sizes), dtype, ("layers", *axes), initializer),
            bias=ParamSpec((layers, *sizes[1:]), dtype, ("layers", *axes[1:]), constant(0.0)),
        )

    return GLMParams(
        word_embeddings=ParamSpec(
            (config.vocab_size, hidden), dtype, ("vocab", "embed"), normal(0.02)
        ),
        layers=LayerParams(
            input_layernorm=layernorm((layers, "layers")),
            query_key_value=linear(
                "query_key_value", (hidden, heads, 3, head_dim), _query_key_value(hidden, gain)
            ),
            dense=linear("dense", (hidden, hidden), _xavier(hidden, hidden, gain)),
            post_attention_layernorm=layernorm((layers, "layers")),
            dense_h_to_4h=linear("dense_h_to_4h", (hidden, 2, inner), _xavier(hidden, inner, gain)),
            dense_4h_to_h=linear("dense_4h_to_h", (inner, hidden), _xavier(inner, hidden, gain)),
        ),
        final_layernorm=layernorm(),
    )


def logical_axes(config: GLMConfig, is_stacked: bool = True) -> GLMParams:
    """The tree of each array's logical axes, layers stacked or as a tuple."""
    axes: GLMParams = axes_of(specs(config))
    if is_stacked:
        return axes
    layer = jax.tree.map(lambda a: a[1:], axes.layers, is_leaf=lambda a: type(a) is tuple)
    apart: GLMParams = axes.replace(layers=(layer,) * config.num_layers)  # type: ignore[attr-defined]
    return apart


def axes_of(tree: Any) -> Any:
    """Of a tree of `ParamSpec` leaves their logical axes."""
    return jax.tree.map(lambda spec: spec.axes, tree, is_leaf=_is_spec)


def parameter_count(config: GLMConfig) -> int:
    """Numbers in the model, from shapes alone."""
    leaves = jax.tree.leaves(specs(config), is_leaf=_is_spec)
    return sum(math.prod(spec.shape) for spec in leaves)


def abstract(config: GLMConfig, mesh: Mesh | None = None) -> GLMParams:
    """The float tree as `jax.ShapeDtypeStruct`, with shardings where a mesh is given."""
    tree: GLMParams = abstract_of(specs(config), mesh)
    return tree


def abstract_of(tree: Any, mesh: Mesh | None) -> Any:
    """`abstract` of a tree of `ParamSpec` leaves."""

    def build(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else parameter_sharding(mesh, spec.axes, spec.shape)
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    return jax.tree.map(build, tree, is_leaf=_is_spec)


def init(config: GLMConfig, key: PRNGKeyArray, mesh: Mesh | None = None) -> GLMParams:
    """Fresh parameters, made where they will live: the same values on every mesh."""
    made: GLMParams = init_of(specs(config), key, mesh)
    return made


def init_of(tree: Any, key: PRNGKeyArray, mesh: Mesh | None) -> Any:
    """`init` of a tree of `ParamSpec` leaves."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_spec)

    def build(key: PRNGKeyArray) -> Any:
        keys = jax.random.split(key, len(leaves))
        arrays = [s.initializer(k, s.shape, s.dtype) for s, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(structure, arrays)

    if mesh is None:
        return jax.jit(build)(key)
    shardings = jax.tree.map(lambda a: a.sharding, abstract_of(tree, mesh))
    return jax.jit(build, out_shardings=shardings)(key)


def quantized_sharding(
    mesh: Mesh, spec: ParamSpec, values_shape: tuple[int, ...], scales_shape: tuple[int, ...]
) -> tuple[Any, Any]:
    """Shardings of a quantised kernel's values and scales.

    Values lie as the float kernel does. Scales follow them but along the contraction,
    where they are split only if every device would get whole groups.
    """
    values = parameter_sharding(mesh, spec.axes, values_shape)
    scale_axes = list(spec.axes)
    whole = spec.axes[1] is None or scales_shape[1] % _axis_size(mesh, spec.axes[1])
    if whole:
        scale_axes[1] = None
    return values, parameter_sharding(mesh, tuple(scale_axes), scales_shape)


def _axis_size(mesh: Mesh, axis: str) -> int:
    mesh_axis = parameter_sharding(mesh, (axis,), (mesh.size,)).spec[0]
    return 1 if mesh_axis is None else int(mesh.shape[mesh_axis])


def map_linears(
    function: Callable[[str, LinearParams], LinearParams], params: GLMParams
) -> GLMParams:
    """Applies `function(name, linear)` to the four linears of the layers, stacked or not."""
    change = functools.partial(map_layer_linears, function)
    layers = params.layers
    changed: GLMParams = params.replace(  # type: ignore[attr-defined]
        layers=tuple(map(change, layers)) if isinstance(layers, tuple) else change(layers)
    )
    return changed


def map_layer_linears(
    function: Callable[[str, LinearParams], LinearParams], layers: LayerParams
) -> LayerParams:
    """`map_linears` for a block, or for stacked ones."""
    linears = {name: function(name, getattr(layers, name)) for name in LINEAR_NAMES}
    changed: LayerParams = layers.replace(**linears)  # type: ignore[attr-defined]
    return changed


def contraction_axis(kernel: Any) -> int:
    """Negative index of the inputs of a kernel stacked over layers."""
    return 1 - len(kernel.shape)


def quantize_params(params: GLMParams, scheme: Scheme) -> GLMParams:
    """The four linears of each (stacked) layer in 8 or 4 bits.

    Embedding, layernorms and biases stay as they are, as in the original.

    Raises:
      QuantizationError: a kernel's inputs do not divide into the scheme's groups.
    """
    layers: Any = params.layers
    quantized: GLMParams = params.replace(  # type: ignore[attr-defined]
        layers=quantize_layers(layers, scheme)
    )
    return quantized


def quantize_layers(layers: LayerParams, scheme: Scheme) -> LayerParams:
    """`quantize_params` for stacked layers alone."""

    def convert(name: str, linear: LinearParams) -> LinearParams:
        axis = contraction_axis(linear.kernel)
        # Layer after layer: floats beside integers are then one layer's, not the model's.
        kernel = _quantize_each(linear.kernel, scheme, axis, KERNEL_AXES[name])
        return LinearParams(kernel=kernel, bias=linear.bias)

    return map_layer_linears(convert, layers)


@functools.partial(jax.jit, static_argnames=("scheme", "axis", "axes"))
def _quantize_each(kernel: Array, scheme: Scheme, axis: int, axes: LogicalAxes) -> Any:
    return jax.lax.map(lambda layer: quantize(layer, scheme, axis, axes), kernel)


def cast_params(params: Any, dtype: str) -> Any:
    """A tree's float arrays in `dtype`; the scales of quantised kernels too."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
    )


def unstack_layers(params: GLMParams) -> GLMParams:
    """Layers as a tuple of blocks, for unrolled programs."""
    if isinstance(params.layers, tuple):
        return params
    unstacked: GLMParams = params.replace(  # type: ignore[attr-defined]
        layers=layers_apart(params.layers)
    )
    return unstacked


def layers_apart(layers: LayerParams) -> tuple[LayerParams, ...]:
    """Stacked blocks as a tuple of them."""
    return transposed(apart(layers), len(layers.input_layernorm.scale))


def transposed(columns: Any, count: int) -> tuple[Any, ...]:
    """Of a tree with tuples of `count` for leaves, as many trees."""
    return tuple(
        jax.tree.map(lambda c, i=i: c[i], columns, is_leaf=lambda c: type(c) is tuple)
        for i in range(count)
    )


def described_apart(params: GLMParams) -> GLMParams:
    """`unstack_layers` of what describes arrays on a mesh."""

    def of_layer(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding: Any = x.sharding
        place = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=place)

    layers: Any = params.layers
    count = layers.input_layernorm.scale.shape[0]
    apart: GLMParams = params.replace(  # type: ignore[attr-defined]
        layers=(jax.tree.map(of_layer, layers),) * count
    )
    return apart


def stack_layers(params: GLMParams) -> GLMParams:
    """Layers stacked again, the form that is stored; the reverse of `unstack_layers`."""
    if not isinstance(params.layers, tuple):
        return params
    stacked: GLMParams = params.replace(  # type: ignore[attr-defined]
        layers=some_layers(params.layers, 0, len(params.layers))
    )
    return stacked


def some_layers(layers: LayerParams | tuple[LayerParams, ...], first: int, end: int) -> LayerParams:
    """Of a model's layers, stacked or apart, those from `first` up to `end`, stacked."""
    some: LayerParams
    if isinstance(layers, tuple):
        some = jax.tree.map(lambda *parts: jnp.stack(parts), *layers[first:end])
    elif (first, end) == (0, len(layers.input_layernorm.scale)):
        some = layers
    else:
        some = jax.tree.map(lambda x: x[first:end], layers)
    return some


@jax.custom_vjp
def _unstack(x: Array) -> tuple[Array, ...]:
    return tuple(x[i] for i in range(len(x)))


@jax.jit
def apart(stacks: Any) -> Any:
    """A tree of stacks as one of tuples of their entries."""
    return jax.tree.map(_unstack, stacks)


# A stack of the parts; the transposes of slices would be sums of padded arrays.
_unstack.defvjp(lambda x: (_unstack(x), None), lambda _, parts: (jnp.stack(parts),))
