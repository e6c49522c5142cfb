"""Random weights, made on the devices: they show whether a model fits and how fast it is before its
weights are downloaded. What such a model generates means nothing."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from glm_jax.checkpoints import parameter_files
from glm_jax.checkpoints.layer_assembly import Part, gathered
from glm_jax.config import GLMConfig, SpecialTokens, glm_130b, glm_config
from glm_jax.model import params as glm_params
from glm_jax.model.abstract_params import abstract_quantized
from glm_jax.model.params import GLMParams, LayerParams, LinearParams
from glm_jax.model.streamed_layers import device_bytes
from glm_jax.numerics import array_dtype
from glm_jax.quantization import QuantizedArray, Scheme
from glm_jax.quantization.packing import join_bytes, split_bytes

PREFIX = "random:"


def is_random(checkpoint: str) -> bool:
    """Return whether a checkpoint's name is "random:SIZE" and no model folder."""
    return checkpoint.startswith(PREFIX)


def random_config(checkpoint: str) -> GLMConfig:
    """Return the config that "random:SIZE" names; for "130b" the released model's.

    Raises:
      ConfigError: SIZE is none of `MODEL_SIZES`.
    """
    size = checkpoint.removeprefix(PREFIX).lower()
    config = glm_130b() if size == "130b" else glm_config(size)
    if config.special_tokens is None:  # the last ids, and a sentencepiece model's end of sentence
        names = [field.name for field in dataclasses.fields(SpecialTokens) if field.name != "eos"]
        first = config.vocab_size - len(names)
        ids = {name: first + i for i, name in enumerate(names)}
        config = config.replace(special_tokens=SpecialTokens(**ids, eos=2))
    return config


def random_model(
    checkpoint: str,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    weight_memory_limit: float | None = None,
    seed: int = 0,
) -> tuple[GLMConfig, GLMParams]:
    """Make a model of a named size with random weights, in the form that runs.

    Quantised kernels are random integers and scales from the start. Layers are made one at a time,
    so that memory stays at the weights and one layer.

    Args:
      checkpoint: "random:SIZE"; see `random_config`.
      mesh, dtype, quantization, weight_memory_limit: see `model_folder.restore`.

    Returns:
      The config, and the parameters, layers in the form that `model_folder.restore` returns.

    Raises:
      ConfigError: the size is unknown.
      QuantizationError: `quantization` says nothing known, or groups do not divide.
      MeshError: the shapes do not divide over the mesh.
      OffloadError: the limit leaves no room for two blocks.
    """
    config = random_config(checkpoint)
    if dtype is not None:
        config = config.replace(param_dtype=array_dtype(dtype), compute_dtype=dtype)
    return config, random_params(config, mesh, quantization, weight_memory_limit, seed)


def random_params(
    config: GLMConfig,
    mesh: Mesh | None = None,
    quantization: str | None = None,
    weight_memory_limit: float | None = None,
    seed: int = 0,
) -> GLMParams:
    """Make the parameters of `random_model` for any config."""
    scheme = None if quantization is None else Scheme.parse(quantization)
    described = described_params(config, mesh, scheme)
    specs = glm_params.specs(config)
    embedding_key, layers_key = jax.random.split(jax.random.key(seed))
    rest: Any = _made(
        parameter_files.embedding_tree(specs),
        parameter_files.embedding_tree(described),
        embedding_key,
    )
    make_layer = layer_maker(config, described.layers, scheme)
    keys = jax.random.split(layers_key, config.num_layers)
    made = (Part(i, i + 1, make_layer(keys[i])) for i in range(config.num_layers))
    limit = math.inf if weight_memory_limit is None else weight_memory_limit
    return GLMParams(layers=gathered(made, config.num_layers, device_bytes(rest), limit), **rest)


def described_params(config: GLMConfig, mesh: Mesh | None, scheme: Scheme | None) -> GLMParams:
    """Describe what `random_model` makes, as `jax.ShapeDtypeStruct` with shardings."""
    if scheme is None:
        tree = glm_params.abstract(config, mesh)
    else:
        tree = abstract_quantized(config, mesh, scheme.format)
    return parameter_files.on_mesh_or_one_device(tree, mesh)


def _made(specs: Any, described: Any, key: PRNGKeyArray) -> Any:
    shardings = jax.tree.map(lambda x: x.sharding, described)
    build = functools.partial(glm_params.init_of, specs, mesh=None)
    return jax.jit(build, out_shardings=shardings)(key)


def layer_maker(config: GLMConfig, described: Any, scheme: Scheme | None) -> Any:
    """Return a jitted function of a key that makes one layer, stacked [1, ...].

    Args:
      described: all layers, of `described_params`.
    """
    one = lambda x: dataclasses.replace(x, shape=(1, *x.shape[1:]))
    specs: Any = jax.tree.map(one, glm_params.specs(config).layers, is_leaf=glm_params.is_spec)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), described)

    def make(key: PRNGKeyArray) -> LayerParams:
        floats_key, *keys = jax.random.split(key, 1 + len(glm_params.LINEAR_NAMES))
        # XLA drops the float kernels that are replaced below.
        layer: LayerParams = glm_params.init_of(specs, floats_key, None)
        if scheme is None:
            return layer
        key_of = dict(zip(glm_params.LINEAR_NAMES, keys, strict=True))

        def quantized(name: str, linear: LinearParams) -> LinearParams:
            kernel = _random_kernel(getattr(like, name).kernel, key_of[name])
            return LinearParams(kernel=kernel, bias=linear.bias)

        return glm_params.map_layer_linears(quantized, layer)

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, described))


def _random_kernel(like: QuantizedArray, key: PRNGKeyArray) -> QuantizedArray:
    """Draw integers that quantising can give, and scales with which products have about the
    magnitude of their inputs."""
    of_values, of_scales, of_zeros = jax.random.split(key, 3)
    values = jax.random.bits(of_values, like.values.shape, jnp.uint8).astype(jnp.int8)
    largest = 2 ** (like.bits - 1) - 1
    if like.zero_points is None:
        values = _symmetric(values, like.bits, largest)
    inputs = like.shape[like.contraction_axis]
    middle = 3**0.5 / (largest * inputs**0.5)  # of integers that are uniformly distributed
    scales = jax.random.uniform(of_scales, like.scales.shape, jnp.float32, 0.5, 1.5) * middle
    zero_points = like.zero_points
    if zero_points is not None:
        zero_points = jax.random.randint(of_zeros, zero_points.shape, -1, 2, jnp.int8)
    return dataclasses.replace(
        like, values=values, scales=scales.astype(like.scales.dtype), zero_points=zero_points
    )


def _symmetric(values: Array, bits: int, largest: int) -> Array:
    """Replace the lowest integer, which symmetric weights do not use, by the one above it."""
    if bits == 8:
        return jnp.maximum(values, -largest)
    return join_bytes(*(jnp.maximum(half, -largest) for half in split_bytes(values)))
