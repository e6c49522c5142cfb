"""What quantised parameters are, before they exist: shapes, dtypes and shardings."""

from typing import Any

import jax
from jax.sharding import Mesh

from glm_jax.config import GLMConfig
from glm_jax.model import params as glm_params
from glm_jax.model.layer_stacks import map_linears
from glm_jax.model.params import KERNEL_AXES, GLMParams, LinearParams
from glm_jax.quantization import QuantizedArray, WeightFormat


def abstract_quantized(
    config: GLMConfig, mesh: Mesh | None, stored: WeightFormat, scales_dtype: Any = None
) -> GLMParams:
    """`params.abstract` of a model whose kernels are quantised.

    Args:
      scales_dtype: by default the config's param_dtype.

    Returns:
      `jax.ShapeDtypeStruct` leaves, layers stacked; with shardings where a mesh is given.

    Raises:
      QuantizationError: a kernel's inputs do not divide into the format's groups.
    """
    specs: Any = glm_params.specs(config).layers

    def quantized(name: str, linear: LinearParams) -> LinearParams:
        spec = getattr(specs, name).kernel
        count, inputs, *outputs = spec.shape
        groups = stored.groups(inputs, glm_params.is_row_parallel(name))
        values = (count, inputs * stored.bits // 8, *outputs)
        scales = (count, groups, *outputs)
        of_values = of_scales = None
        if mesh is not None:
            of_values, of_scales = glm_params.quantized_sharding(mesh, spec, values, scales)
        describe = lambda dtype: jax.ShapeDtypeStruct(scales, dtype, sharding=of_scales)
        kernel = QuantizedArray(
            values=jax.ShapeDtypeStruct(values, "int8", sharding=of_values),
            scales=describe(scales_dtype or spec.dtype),
            bits=stored.bits,
            contraction_axis=glm_params.contraction_axis(spec),
            zero_points=describe("int8") if stored.zero_point else None,
            axes=KERNEL_AXES[name],
        )
        return LinearParams(kernel, linear.bias)

    return map_linears(quantized, glm_params.abstract(config, mesh))
