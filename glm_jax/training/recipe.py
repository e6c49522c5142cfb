"""How a model is trained, as one immutable value that is static under ``jax.jit``."""

import dataclasses

from glm_jax.config import ConfigError, Range, check_ranges
from glm_jax.model.adapters import AdapterConfig
from glm_jax.model.training import REMAT_POLICIES

# How the optimiser keeps the means of gradients and of their squares: as floats, as 8-bit
# integers with scales, or squares alone by rows and columns.
MOMENTS = ("float32", "int8", "factored")
_FRACTION = Range(float, 0, 1)
_SHARE_LEFT_OUT = Range(float, 0, 1, without_high=True)
MAX_COUNT = 2**31 - 1  # of rows and steps, which programs count as int32
RANGES = {
    "total_samples": Range(int, 1, MAX_COUNT),
    "learning_rate": Range(float, 0, 1, without_low=True),
    "initial_learning_rate": _FRACTION,
    "final_learning_rate_fraction": _FRACTION,
    "warmup_fraction": _FRACTION,
    "beta1": _SHARE_LEFT_OUT,
    "beta2": _SHARE_LEFT_OUT,
    "epsilon": Range(float, 0, 1, without_low=True),
    "weight_decay": _FRACTION,
    "gradient_clip": Range(float, 0, 1e9, without_low=True),
    "dropout": _SHARE_LEFT_OUT,
    "attention_dropout": _SHARE_LEFT_OUT,
    "loss_chunk": Range(int, 1, MAX_COUNT),
    "z_loss": _FRACTION,
    "embedding_gradient": _FRACTION,
    "embedding_gradient_samples": Range(int, 0, MAX_COUNT),
    "loss_scale_window": Range(int, 1, MAX_COUNT),
    "median_window": Range(int, 1, 1 << 16),
    "skip_factor": Range(float, 1, 1e9, also=(0,)),
    "spike_loss": Range(float, 0, 1e9),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Numbers of arXiv:2210.02414, sections 2.3 and 3, and what keeps a run alive.

    Attributes:
      total_samples: rows until the end, by which the learning rate falls.
      learning_rate, initial_learning_rate, final_learning_rate_fraction, warmup_fraction:
        from the initial rate up to the peak over this share of the samples, then a cosine
        down to the fraction of the peak.
      beta1, beta2, epsilon, weight_decay: of AdamW; biases and layernorms do not decay.
      moments: one of `MOMENTS`.
      offload_moments: keeps them in hosts' memory, and a block's at a time on the devices.
      gradient_clip: global norm that gradients are scaled down to.
      dropout: share of activations: the embedding's and both outputs of a block.
      attention_dropout: share of attention's weights.
      remat: what is saved for the backward pass: "none" recomputes nothing, "blocks" all
        but a block's input, "dots" all but the results of matrix products.
      loss_chunk: positions whose logits exist at a time.
      z_loss: times the squared logarithm of the softmax's sum; 0 for none.
      embedding_gradient: times which the embedding's gradient is taken.
      embedding_gradient_samples: over so many samples that factor rises to 1; 0 to keep it.
      loss_scaling: dynamic loss scaling, for float16.
      loss_scale_window: good steps until the scale doubles.
      median_window: steps whose gradient norms and losses a step is held against.
      skip_factor: a step whose gradient norm is above this multiple of the running median
        is skipped; 0 skips only what is not finite.
      spike_loss: nats above the running median from which a loss is marked as a spike.
      adapter: what is trained beside frozen parameters; None to train all of these.
    """

    total_samples: int
    learning_rate: float = 8e-5
    initial_learning_rate: float = 1e-7
    final_learning_rate_fraction: float = 0.1
    warmup_fraction: float = 0.005
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    moments: str = "float32"
    offload_moments: bool = False
    gradient_clip: float = 1.0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    remat: str = "none"
    loss_chunk: int = 256
    z_loss: float = 0.0
    embedding_gradient: float = 0.1
    embedding_gradient_samples: int = 0
    loss_scaling: bool = False
    loss_scale_window: int = 1000
    median_window: int = 64
    skip_factor: float = 10.0
    spike_loss: float = 1.0
    adapter: AdapterConfig | None = None

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        if self.remat not in REMAT_POLICIES:
            raise ConfigError(f"optimizer.remat={self.remat!r}: one of {REMAT_POLICIES}")
        if self.moments not in MOMENTS:
            raise ConfigError(f"optimizer.moments={self.moments!r}: one of {MOMENTS}")
        if self.offload_moments and self.adapter is not None:
            raise ConfigError(
                "optimizer.offload_moments is for all parameters; those of adapters are small"
            )

    @property
    def updates_by_block(self) -> bool:
        """Whether blocks have an optimiser each and are updated one after another: what that
        takes besides the moments is a block's then, not the model's."""
        return self.adapter is None and (self.offload_moments or self.moments != "float32")


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """Rows of a batch while it grows (arXiv:2210.02414, section 2.3).

    Attributes:
      final, initial: rows at the end, and at the start.
      ramp_samples: rows over which it grows.
      increment: rows that it grows by at a time; each size is a program of its own.
      micro_batch: rows that the devices take at once; divides all of these.
    """

    final: int
    initial: int
    ramp_samples: int
    increment: int
    micro_batch: int

    def __post_init__(self) -> None:
        if self.initial > self.final:
            raise ConfigError(
                f"data.initial_batch_size={self.initial} is more than batch_size={self.final}"
            )
        for name in ("final", "initial", "increment"):
            value = getattr(self, name)
            if value < 1 or value % self.micro_batch:
                raise ConfigError(
                    f"data: the batch's {name} size {value} is no multiple of "
                    f"micro_batch_size={self.micro_batch}"
                )

    def accumulation(self, samples: int) -> int:
        """Micro-batches of the batch that begins after so many rows."""
        size = self.final
        if samples < self.ramp_samples:
            grown = (self.final - self.initial) * samples // self.ramp_samples
            size = self.initial + grown // self.increment * self.increment
        return size // self.micro_batch
