"""Low-rank adapters (LoRA, arXiv:2106.09685): pairs of matrices, trained beside frozen kernels.

Instead of a kernel W the model computes with W + scale * down up, where down is [inputs, rank]
and up [rank, *outputs]. W may be quantised: it never changes, and is never materialised in floats.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

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
from glm_jax.model.weights import AdaptedWeight, LowRank, MultiAdaptedWeight, with_adapter_ids

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
    """Return the model with adapters beside its kernels, layers in any form."""

    def adapted(layers: LayerParams, own: Adapters) -> LayerParams:
        def change(name: str, linear: LinearParams) -> LinearParams:
            pair = own.pairs.get(name)
            if pair is None:
                return linear
            return LinearParams(AdaptedWeight(linear.kernel, pair, scale), linear.bias)

        return map_layer_linears(change, layers)

    return dataclasses.replace(params, layers=as_layers(params.layers).map(adapted, adapters))


def attach_several(
    params: GLMParams, several: Sequence[tuple[AdapterConfig, Adapters]], dtype: str
) -> GLMParams:
    """Return the model with several adapters beside its kernels, of which each token uses one or
    none; see `choose_adapters`.

    Args:
      several: their ids count from 1 in this order.
      dtype: that their arrays are cast to, the scales multiplied in.
    """
    ranks, joined = {}, {}
    for name in LINEAR_NAMES:
        ranks[name] = tuple(
            adapter.rank if name in adapter.targets else 0 for adapter, _ in several
        )
        own = [(x.pairs[name], adapter.scale) for adapter, x in several if name in x.pairs]
        if own:
            joined[name] = _joined(own, dtype)

    def adapted(layers: LayerParams, pairs: dict[str, LowRank]) -> LayerParams:
        def change(name: str, linear: LinearParams) -> LinearParams:
            if name not in pairs:
                return linear
            weight = MultiAdaptedWeight(linear.kernel, pairs[name], ranks[name])
            return LinearParams(weight, linear.bias)

        return map_layer_linears(change, layers)

    return dataclasses.replace(params, layers=as_layers(params.layers).map(adapted, joined))


def _joined(pairs: Sequence[tuple[LowRank, float]], dtype: str) -> LowRank:
    """Pairs of one linear, layers stacked, joined along the rank and sharded as each of them is."""

    def join(pairs: Sequence[tuple[LowRank, Array]]) -> LowRank:
        down = jnp.concatenate([pair.down for pair, _ in pairs], axis=2)
        up = jnp.concatenate([scale * pair.up for pair, scale in pairs], axis=1)
        return LowRank(down.astype(dtype), up.astype(dtype))

    shardings = jax.tree.map(lambda x: x.sharding, pairs[0][0])
    joined: LowRank = jax.jit(join, out_shardings=shardings)(pairs)
    return joined


def choose_adapters(layer: LayerParams, adapter_ids: Int[Array, "batch seq"] | None) -> LayerParams:
    """Return a layer as tokens see it that use these of the adapters that `attach_several` gave it.

    Args:
      adapter_ids: from 1 on, 0 for none; None where no token uses any.
    """
    if adapter_ids is None:
        return layer
    choose = lambda _, linear: LinearParams(
        with_adapter_ids(linear.kernel, adapter_ids), linear.bias
    )
    return map_layer_linears(choose, layer)


def adapter_count(params: GLMParams) -> int:
    """How many adapters tokens may choose from."""
    is_weight = lambda node: isinstance(node, MultiAdaptedWeight)
    weights = filter(is_weight, jax.tree.leaves(params.layers, is_leaf=is_weight))
    return max((len(weight.ranks) for weight in weights), default=0)


def merged_kernel(kernel: Any, pair: LowRank, scale: float) -> Any:
    """kernel [inputs, *outputs] + scale * down up, computed in float32, in kernel's dtype."""
    product = jnp.tensordot(
        jnp.asarray(pair.down, jnp.float32), jnp.asarray(pair.up, jnp.float32), 1,
        precision="highest",
    )  # fmt: skip
    return (jnp.asarray(kernel).astype(jnp.float32) + scale * product).astype(kernel.dtype)
