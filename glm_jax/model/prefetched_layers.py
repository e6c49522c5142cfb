"""A loop over layers whose weights are divided over devices: while a layer computes, the next
layer's weights are gathered.

The compiler gathers weights where the first product needs them, and all devices wait. Here each
turn of the loop finds its layer's weights gathered by the turn before, and nothing that it
computes depends on those that it gathers; so forward, and backward from the last layer to the
first. The backward pass finds each layer's input saved, and computes the layer again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.config import GLMConfig
from glm_jax.model.layer_stacks import take
from glm_jax.model.params import LayerParams, LinearParams, is_spec, map_layer_linears, specs
from glm_jax.sharding import constrain_parameters, gather_parameters, parameters_are_divided

# step(x, layer, index, shared) -> x, output
Step = Callable[[Array, LayerParams, Array, Any], tuple[Array, Array]]


def suits(layers: Any, config: GLMConfig) -> bool:
    """Return whether layers are a stack of float arrays, divided over the surrounding mesh."""
    floats: Any = jax.tree.structure(specs(config).layers, is_leaf=is_spec)
    return parameters_are_divided() and bool(floats == jax.tree.structure(layers))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan(
    step: Step, config: GLMConfig, layers: LayerParams, x: Array, shared: Any
) -> tuple[Array, Array]:
    """Run `step` over stacked layers; differentiable in layers and x, by the last x alone.

    Args:
      step: step(x, layer, index, shared) -> x, output. It closes over no traced array. Of the
        layer that it gets, kernels have the dtype of the products.
      shared: a tree of arrays that all layers take.

    Returns:
      The last x, and the outputs, which have no gradient, stacked over layers.
    """
    return _forward(step, config, layers, x, shared)[0]


def _gathered(layers: LayerParams, index: Array | int, config: GLMConfig) -> LayerParams:
    def cast(name: str, linear: LinearParams) -> LinearParams:
        return dataclasses.replace(linear, kernel=linear.kernel.astype(config.activation_dtype))

    return gather_parameters(map_layer_linears(cast, take(layers, index)), _axes(config))


def _axes(config: GLMConfig) -> LayerParams:
    """Return logical axes of a layer's arrays."""
    axes: LayerParams = jax.tree.map(lambda s: s.axes[1:], specs(config).layers, is_leaf=is_spec)
    return axes


def _forward(
    step: Step, config: GLMConfig, layers: LayerParams, x: Array, shared: Any
) -> tuple[tuple[Array, Array], Any]:
    def turn(carry: tuple[Array, LayerParams], index: Array) -> Any:
        x, layer = carry
        # The last turn gathers its own layer again, with which the backward pass begins.
        following = _gathered(layers, jnp.minimum(index + 1, config.num_layers - 1), config)
        after, output = step(x, layer, index, shared)
        return (after, following), (x, output)

    start = (x, _gathered(layers, 0, config))
    (x, last), (inputs, outputs) = jax.lax.scan(turn, start, jnp.arange(config.num_layers))
    return (x, outputs), (layers, last, inputs, shared)


def _backward(
    step: Step, config: GLMConfig, saved: Any, gradients: tuple[Array, Array]
) -> tuple[LayerParams, Array, None]:
    layers, last, inputs, shared = saved

    def turn(carry: tuple[Array, LayerParams], scanned: tuple[Array, Array]) -> Any:
        gradient, layer = carry
        index, x = scanned
        following = _gathered(layers, jnp.maximum(index - 1, 0), config)
        # In the dtype that parameters have, so that gradients are summed in it over devices.
        wide = jax.tree.map(lambda x, parameter: x.astype(parameter.dtype), layer, layers)
        run = lambda x, layer: step(x, layer, index, shared)
        _, pull, _ = jax.vjp(run, x, wide, has_aux=True)
        gradient, of_layer = pull(gradient)
        return (gradient, following), constrain_parameters(of_layer, _axes(config))

    scanned = (jnp.arange(config.num_layers), inputs)
    start = (gradients[0], last)
    (gradient, _), of_layers = jax.lax.scan(turn, start, scanned, reverse=True)
    return of_layers, gradient, None


scan.defvjp(_forward, _backward)
