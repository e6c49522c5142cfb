"""Parameter trees: every array's shape, dtype, logical axes and initialiser.

Layers are stacked on a leading axis here; `layer_stacks` has the other forms.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from glm_jax.config import GLMConfig
from glm_jax.model.weights import Embedding, LowRank, Weight, as_weight
from glm_jax.quantization import Scheme, quantize
from glm_jax.sharding import LogicalAxes, parameter_sharding

Initializer = Callable[[PRNGKeyArray, tuple[int, ...], Any], Float[Array, "..."]]


@struct.dataclass
class LayerNormParams:
    scale: Any
    bias: Any


@struct.dataclass
class LinearParams:
    """kernel: [inputs, *outputs], in any form that `as_weight` takes; bias: [*outputs]."""

    kernel: Any
    bias: Any

    @property
    def weight(self) -> Weight:
        """The interface of the kernel, of one layer."""
        return as_weight(self.kernel)


@struct.dataclass
class Adapters:
    """Pairs by the linear's name, layers stacked as kernels are; see `model.adapters`."""

    pairs: dict[str, LowRank]


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


def is_row_parallel(name: str) -> bool:
    """Whether released shards divide a linear's inputs among them, not its outputs."""
    return KERNEL_AXES[name][0] != "embed"


@struct.dataclass
class GLMParams:
    """The whole model.

    Attributes:
      word_embeddings: [vocab, embed], also the output projection, in any form that `as_weight`
        takes.
      layers: stacked `LayerParams`, a tuple of them, or `OffloadedLayers`.
    """

    word_embeddings: Any
    layers: Any
    final_layernorm: LayerNormParams

    @property
    def embedding(self) -> Embedding:
        """The interface of the word embedding."""
        return as_weight(self.word_embeddings)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What one array is, before it exists.

    Attributes:
      decays: weight decay applies in training; each parameter says so itself.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: LogicalAxes
    initializer: Initializer
    decays: bool


def is_spec(leaf: Any) -> bool:
    """Whether a node of a tree is a `ParamSpec`, for `is_leaf`."""
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
    """Return the whole model as `ParamSpec` leaves, layers stacked.

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
            scale=ParamSpec(shape, dtype, axes, constant(1.0), decays=False),
            bias=ParamSpec(shape, dtype, axes, constant(0.0), decays=False),
        )

    def linear(name: str, sizes: tuple[int, ...], initializer: Initializer) -> LinearParams:
        axes = KERNEL_AXES[name]
        of_kernel, of_bias = ("layers", *axes), ("layers", *axes[1:])
        return LinearParams(
            kernel=ParamSpec((layers, *sizes), dtype, of_kernel, initializer, decays=True),
            bias=ParamSpec((layers, *sizes[1:]), dtype, of_bias, constant(0.0), decays=False),
        )

    return GLMParams(
        word_embeddings=ParamSpec(
            (config.vocab_size, hidden), dtype, ("vocab", "embed"), normal(0.02), decays=True
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


def parameter_count(config: GLMConfig) -> int:
    """Numbers in the model, from shapes alone."""
    return _count(specs(config))


def layer_parameter_count(config: GLMConfig) -> int:
    """Numbers in a layer, from shapes alone."""
    return _count(specs(config).layers) // config.num_layers


def _count(tree: Any) -> int:
    leaves = jax.tree.leaves(tree, is_leaf=is_spec)
    return sum(math.prod(spec.shape) for spec in leaves)


def abstract(config: GLMConfig, mesh: Mesh | None = None) -> GLMParams:
    """Return the float tree as `jax.ShapeDtypeStruct`, with shardings where a mesh is given."""
    return abstract_of(specs(config), mesh)


def abstract_of(tree: Any, mesh: Mesh | None) -> Any:
    """`abstract` of a tree of `ParamSpec` leaves."""

    def build(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else parameter_sharding(mesh, spec.axes, spec.shape)
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    return jax.tree.map(build, tree, is_leaf=is_spec)


def init(config: GLMConfig, key: PRNGKeyArray, mesh: Mesh | None = None) -> GLMParams:
    """Fresh parameters, made where they will live: the same values on every mesh."""
    return init_of(specs(config), key, mesh)


def init_of(tree: Any, key: PRNGKeyArray, mesh: Mesh | None) -> Any:
    """`init` of a tree of `ParamSpec` leaves."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_spec)

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

    Values are sharded as the float kernel is, and so are scales except along the contraction,
    where they are split only if every device gets whole groups.
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


def map_layer_linears(
    function: Callable[[str, LinearParams], LinearParams], layers: LayerParams
) -> LayerParams:
    """Apply `function(name, linear)` to the four linears of a layer, or of stacked ones."""
    linears: dict[str, Any] = {name: function(name, getattr(layers, name)) for name in LINEAR_NAMES}
    return dataclasses.replace(layers, **linears)


def contraction_axis(kernel: Any) -> int:
    """Negative index of the inputs of a kernel stacked over layers."""
    return 1 - len(kernel.shape)


def quantize_params(params: GLMParams, scheme: Scheme) -> GLMParams:
    """Return the four linears of each (stacked) layer in 8 or 4 bits.

    Embedding, layernorms and biases stay as they are, as in the original.

    Raises:
      QuantizationError: a kernel's inputs do not divide into the scheme's groups.
    """
    return dataclasses.replace(params, layers=quantize_layers(params.layers, scheme))


def quantize_layers(layers: LayerParams, scheme: Scheme) -> LayerParams:
    """`quantize_params` for stacked layers alone."""

    def convert(name: str, linear: LinearParams) -> LinearParams:
        axis = contraction_axis(linear.kernel)
        # One layer at a time: float32 copies are then one layer's, not the model's.
        kernel = _quantize_each(linear.kernel, scheme, axis, KERNEL_AXES[name])
        return LinearParams(kernel=kernel, bias=linear.bias)

    return map_layer_linears(convert, layers)


@functools.partial(jax.jit, static_argnames=("scheme", "axis", "axes"))
def _quantize_each(kernel: Array, scheme: Scheme, axis: int, axes: LogicalAxes) -> Any:
    return jax.lax.map(lambda layer: quantize(layer, scheme, axis, axes), kernel)


def cast_params(params: Any, dtype: str) -> Any:
    """Return a tree's float arrays in `dtype`; the scales of quantised kernels too."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
    )
