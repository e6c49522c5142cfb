"""How a model is trained, as one immutable value that is static under ``jax.jit``."""

import dataclasses
import functools
import math

from glm_jax.config import ConfigError, Range, check_ranges
from glm_jax.kernels.attention.api import IMPLEMENTATIONS
from glm_jax.model.adapters import AdapterConfig
from glm_jax.model.training import REMAT_POLICIES
from glm_jax.numerics import FLOAT8

# How the optimiser stores moments: as floats, as 8-bit integers with scales, or the second moment
# alone, factored into rows and columns.
MOMENTS = ("float32", "int8", "factored")
MATMUL_PRECISIONS = ("default", FLOAT8)
ATTENTION = ("auto", *IMPLEMENTATIONS)
_FRACTION = Range(float, 0, 1)
_FRACTION_BELOW_1 = Range(float, 0, 1, without_high=True)
MAX_COUNT = 2**31 - 1  # of rows and steps: programs count them as int32
RANGES = {
    "total_samples": Range(int, 1, MAX_COUNT),
    "learning_rate": Range(float, 0, 1, without_low=True),
    "initial_learning_rate": _FRACTION,
    "final_learning_rate_fraction": _FRACTION,
    "warmup_fraction": _FRACTION,
    "beta1": _FRACTION_BELOW_1,
    "beta2": _FRACTION_BELOW_1,
    "epsilon": Range(float, 0, 1, without_low=True),
    "weight_decay": _FRACTION,
    "gradient_clip": Range(float, 0, 1e9, without_low=True),
    "dropout": _FRACTION_BELOW_1,
    "attention_dropout": _FRACTION_BELOW_1,
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
    """How to train: the numbers of arXiv:2210.02414, sections 2.3 and 3, and stability.

    Attributes:
      total_samples: rows of the whole run.
      learning_rate: peak, reached after the warm-up.
      initial_learning_rate: at the first step.
      final_learning_rate_fraction: of the peak, to which a cosine decays at the last row.
      warmup_fraction: share of the rows with a linear warm-up.
      beta1, beta2, epsilon: of Adam.
      weight_decay: of parameters whose `ParamSpec.decays`.
      moments: one of `MOMENTS`.
      offload_moments: moments are in hosts' memory, and on the devices block by block.
      gradient_clip: maximum global norm of gradients.
      dropout: share of activations: of the embedding's and both outputs of a block.
      attention_dropout: share of attention probabilities.
      attention: which kernel computes it: "auto" the preferred one that takes the arguments, or
        one of `IMPLEMENTATIONS`.
      matmul_precision: of a block's four linears: "default" the model's compute dtype, or "float8"
        for GPUs of compute capability 8.9 and later, emulated on CPU. Embedding, logits and
        attention stay in the compute dtype.
      remat: what the backward pass recomputes: "none" nothing, "dots" all but the results of
        linears and of attention, "offload" the same, with these in hosts' memory meanwhile,
        "attention" all but attention's, "blocks" all but a block's input.
      loss_chunk: tokens of a device whose logits exist at a time. Each such piece adds to the
        table's gradient once, which takes as long as the products of some 300 tokens.
      z_loss: factor of the squared log-sum-exp of the logits; 0 for none.
      embedding_gradient: factor of the embedding's gradient.
      embedding_gradient_samples: rows over which that factor rises to 1; 0 for a constant.
      loss_scaling: dynamic loss scaling, for float16.
      loss_scale_window: good steps after which the loss scale doubles.
      median_window: good steps whose median a step's gradient norm and loss are compared with.
      skip_factor: a step whose gradient norm is above this multiple of the median is skipped;
        0 skips only steps that are not finite.
      spike_loss: nats above the median from which a loss is marked as a spike.
      adapter: the adapters to train beside frozen parameters; None to train all parameters.
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
    attention: str = "auto"
    matmul_precision: str = "default"
    remat: str = "none"
    loss_chunk: int = 2048
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
        if self.attention not in ATTENTION:
            raise ConfigError(f"optimizer.attention={self.attention!r}: one of {ATTENTION}")
        if self.matmul_precision not in MATMUL_PRECISIONS:
            raise ConfigError(
                f"optimizer.matmul_precision={self.matmul_precision!r}: one of {MATMUL_PRECISIONS}"
            )
        if self.matmul_precision == FLOAT8 and self.adapter is not None:
            raise ConfigError(
                "optimizer.matmul_precision='float8' is for training all parameters, without "
                "adapters"
            )
        if self.moments not in MOMENTS:
            raise ConfigError(f"optimizer.moments={self.moments!r}: one of {MOMENTS}")
        if self.offload_moments and self.adapter is not None:
            raise ConfigError(
                "optimizer.offload_moments is for all parameters; those of adapters are small"
            )

    @property
    def attention_implementation(self) -> str | None:
        """The name that `attention` takes."""
        return None if self.attention == "auto" else self.attention

    @property
    def updates_by_block(self) -> bool:
        """True where each block has an optimiser of its own and they run one after another.

        Their temporaries are then those of one block, not of the model.
        """
        return self.adapter is None and (self.offload_moments or self.moments != "float32")


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """Rows of a batch, which grows at the start of a run (arXiv:2210.02414, section 2.3).

    Attributes:
      final, initial: rows of a batch at the end and at the start.
      ramp_samples: rows of the run over which the batch grows.
      increment: rows added at a time; each batch size is compiled as a program.
      micro_batch: rows that the devices compute at once at most; divides the final size.
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
        for name in ("final", "initial"):
            size = getattr(self, name)
            if size % self.micro_batch and (name == "final" or math.prod(self._split(size)) < size):
                raise ConfigError(
                    f"data: the batch's {name} size {size} is no multiple of "
                    f"micro_batch_size={self.micro_batch}"
                )

    @property
    def unit(self) -> int:
        """The rows that all micro-batches of the run are multiples of."""
        return math.gcd(self.final, self.initial, self.increment, self.micro_batch)

    def accumulation(self, samples: int) -> int:
        """Return the number of micro-batches of the batch that begins after `samples` rows."""
        return self._split(self._size(samples))[0]

    def rows(self, samples: int) -> int:
        """Return the rows of each of these micro-batches: `micro_batch`, or fewer in the ramp."""
        return self._split(self._size(samples))[1]

    def _size(self, samples: int) -> int:
        if samples >= self.ramp_samples:
            return self.final
        grown = (self.final - self.initial) * samples // self.ramp_samples
        return self.initial + grown // self.increment * self.increment

    def _split(self, size: int) -> tuple[int, int]:
        return _split(size, self.micro_batch, self.unit)


@functools.cache
def _split(size: int, micro_batch: int, unit: int) -> tuple[int, int]:
    """Return the fewest micro-batches, and their rows, that make the largest batch up to `size`:
    as large, if it divides into as few as its rows need."""
    at_most = min(micro_batch, size)
    splits = [
        (count, min(at_most, size // count) // unit * unit)
        for count in range(1, -(-size // micro_batch) + 1)
    ]
    return max(splits, key=lambda split: (math.prod(split), -split[0]))
