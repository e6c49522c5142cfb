"""Low-rank adapters (LoRA, arXiv:2106.09685): pairs of matrices, trained beside frozen kernels.

Instead of a kernel W the model computes with W + scale * down up, where down is [inputs, rank]
and up [rank, *outputs]. W may be quantised: it never changes, and is never materialised in floats.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from glm_jax.config import ConfigError, GLMConfig, Range, check_ranges
from glm_jax.model import params as glm_params
from glm_jax.model.layer_stacks import as_layers
from glm_jax.model.params import (
    KERNEL_AXES,
    LINEAR_NAMES,
    Adapters,
    GLMParams,
    LayerParams,
    LinearParams,
    ParamSpec,
    map_layer_linears,
)
from glm_jax.model.weights import AdaptedWeight, LowRank

# Of `AdapterConfig`.
RANGES = {
    "rank": Range(int, 1, 1 << 16),
    "alpha": Range(float, 0, 1e9, without_low=True),
    "dropout": Range(float, 0, 1, without_high=True),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The shape of adapters, and how they are trained.

    Attributes:
      rank: inner size of each pair of matrices.
      alpha: the product of a pair is multiplied by alpha / rank.
      dropout: share of an adapter's inputs that training sets to zero.
      targets: the linears that have one, of `LINEAR_NAMES`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEAR_NAMES

    def __post_init__(self) -> None:
        check_ranges(self, RANGES, "adapter.")
        unknown = [name for name in self.targets if name not in LINEAR_NAMES]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"adapter.targets={','.join(self.targets)}: expected one or more of "
                f"{','.join(LINEAR_NAMES)}, each once"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @classmethod
    def from_dict(cls, fields: Any) -> "AdapterConfig":
        """Inverse of `dataclasses.asdict`.

        Raises:
          ConfigError: unknown fields, or values out of range.
        """
        try:
            return cls(**(dict(fields) | {"targets": tuple(fields["targets"])}))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"adapter: {error}") from error


def specs(config: GLMConfig, adapter: AdapterConfig) -> Adapters:
    """All pairs as `ParamSpec` leaves, layers stacked, in float32.

    down begins with the variance of its inputs' mean, up with zeros, so that a model with
    fresh adapters is the model.
    """
    layers: Any = glm_params.specs(config).layers
    pairs = {}
    for name in adapter.targets:
        count, inputs, *outputs = getattr(layers, name).kernel.shape
        of_inputs, *of_outputs = KERNEL_AXES[name]
        pairs[name] = LowRank(
            down=ParamSpec(
                (count, inputs, adapter.rank),
                "float32",
                ("layers", of_inputs, None),
                glm_params.normal(inputs**-0.5),
                decays=True,
            ),
            up=ParamSpec(
                (count, adapter.rank, *outputs),
                "float32",
                ("layers", None, *of_outputs),
                glm_params.constant(0.0),
                decays=True,
            ),
        )
    return Adapters(pairs)


def attach(params: GLMParams, adapters: Adapters, scale: float) -> GLMParams:
    """The model with adapters beside its kernels, layers in any form."""

    def adapted(layers: LayerParams, own: Adapters) -> LayerParams:
        def change(name: str, linear: LinearParams) -> LinearParams:
            pair = own.pairs.get(name)
            if pair is None:
                return linear
            return LinearParams(AdaptedWeight(linear.kernel, pair, scale), linear.bias)

        return map_layer_linears(change, layers)

    return dataclasses.replace(params, layers=as_layers(params.layers).map(adapted, adapters))


def merged_kernel(kernel: Any, pair: LowRank, scale: float) -> Any:
    """kernel [inputs, *outputs] + scale * down up, computed in float32, in kernel's dtype."""
    product = jnp.tensordot(
        jnp.asarray(pair.down, jnp.float32), jnp.asarray(pair.up, jnp.float32), 1,
        precision="highest",
    )  # fmt: skip
    return (jnp.asarray(kernel).astype(jnp.float32) + scale * product).astype(kernel.dtype)
