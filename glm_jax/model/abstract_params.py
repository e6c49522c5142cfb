"""What quantised parameters are, before they exist: shapes, dtypes and shardings."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from glm_jax.config import GLMConfig
from glm_jax.model import params as glm_params
from glm_jax.model.params import GLMParams, LinearParams
from glm_jax.quantization import QuantizedArray, Scheme


def abstract_quantized(config: GLMConfig, mesh: Mesh | None, scheme: Scheme) -> GLMParams:
    """`params.abstract` of a model whose kernels are quantised.

    Returns:
      `jax.ShapeDtypeStruct` leaves, layers stacked; with shardings where a mesh is given.

    Raises:
      QuantizationError: a kernel's inputs do not divide into the scheme's groups.
    """
    floats = glm_params.abstract(config, mesh)
    specs: Any = glm_params.specs(config).layers
    unsearched = dataclasses.replace(scheme, search=False)  # which is quicker to trace
    kernels: Any = jax.eval_shape(
        lambda layers: glm_params.quantize_layers(layers, unsearched), floats.layers
    )

    def place(name: str, linear: LinearParams) -> LinearParams:
        kernel: QuantizedArray = getattr(kernels, name).kernel
        values, scales = kernel.values.shape, kernel.scales.shape
        of_values = of_scales = None
        if mesh is not None:
            spec = getattr(specs, name).kernel
            of_values, of_scales = glm_params.quantized_sharding(mesh, spec, values, scales)
        at = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        zero_points = kernel.zero_points
        placed = kernel.replace(  # type: ignore[attr-defined]
            values=at(kernel.values, of_values),
            scales=at(kernel.scales, of_scales),
            zero_points=None if zero_points is None else at(zero_points, of_scales),
        )
        return LinearParams(kernel=placed, bias=linear.bias)

    return glm_params.map_linears(place, floats)
