"""Adapters that change a model's answers, drawn at random."""

import jax
import jax.numpy as jnp

from glm_jax.checkpoints.adapter_folder import model_identity, save_adapter
from glm_jax.checkpoints.model_folder import load_config
from glm_jax.model import adapters as model_adapters
from glm_jax.model.adapters import merged_kernel
from glm_jax.model.layer_stacks import map_linears
from glm_jax.model.params import LinearParams, init_of
from glm_jax.quantization import QuantizedArray, dequantize


def drawn(config, adapter, mesh=None, seed=5):
    """Adapters whose second matrices are not the zeros that they begin with."""
    fresh = init_of(model_adapters.specs(config, adapter), jax.random.key(seed), mesh)
    draw = lambda x: 0.05 * jax.random.normal(jax.random.key(seed + 1), x.shape)
    return jax.tree.map(lambda x: x + draw(x), fresh)


def save_drawn(folder, model, adapter, seed=5):
    """Writes a folder of adapters of a model folder, and returns them."""
    config = load_config(model)
    adapters = drawn(config, adapter, seed=seed)
    save_adapter(folder, adapter, adapters, model_identity(model, config))
    return adapters


def merged(params, pairs, scale):
    """The model with adapters in its kernels, which are floats then."""

    def change(name, linear):
        kernel = linear.kernel
        if isinstance(kernel, QuantizedArray):
            kernel = dequantize(kernel, jnp.float32)
        if name in pairs.pairs:
            merge = jax.vmap(lambda k, p: merged_kernel(k, p, scale))
            kernel = merge(kernel, pairs.pairs[name])
        return LinearParams(kernel, linear.bias)

    return map_linears(change, params)
