"""What a GLM model is: one immutable config, static under ``jax.jit``."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.errors import UserError, parser_refusal, shown
from glm_jax.numerics import TENSORFLOAT32, array_dtype

_FLOAT_DTYPES = ("float32", "bfloat16", "float16")
COMPUTE_DTYPES = (*_FLOAT_DTYPES, TENSORFLOAT32)
CACHE_DTYPES = (*_FLOAT_DTYPES, "int8")
_ROTARY_DTYPES = ("float16", "float32")


class ConfigError(UserError):
    """A configuration that is not valid; the message names the field."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The valid numbers of a field; text, None, bool, NaN and infinities are not valid.

    Attributes:
      kind: int, or float, for which an int is valid too.
      low, high: bounds, inclusive.
      without_low, without_high: the bound is exclusive.
      also: further valid numbers, such as a 0 that turns a feature off.
    """

    kind: type
    low: int | float
    high: int | float
    without_low: bool = False
    without_high: bool = False
    also: tuple[int, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError if a value is out of range; `name` is the field's."""
        kinds = (int,) if self.kind is int else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool):
            is_above = value > self.low if self.without_low else value >= self.low
            is_below = value < self.high if self.without_high else value <= self.high
            if (is_above and is_below) or value in self.also:
                return
        raise ConfigError(f"{name}={shown(value)}: expected {self}")

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.without_low else f"{self.low:.12g}"
        high = f"below {self.high:g}" if self.without_high else f"{self.high:.12g}"
        kind = "an integer" if self.kind is int else "a number"
        also = "".join(f", or {value:g}" for value in self.also)
        return f"{kind} from {low} to {high}{also}"


def check_ranges(fields: Any, ranges: Mapping[str, Range], prefix: str = "") -> None:
    """Raise ConfigError for the first attribute of `fields` that is out of its range.

    Args:
      prefix: of names in the message, such as "adapter.".
    """
    for name, range_ in ranges.items():
        range_.check(prefix + name, getattr(fields, name))


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that are not text; the defaults are the released model's.

    Attributes:
      mask: [MASK], a short blank inside a text.
      gmask: [gMASK], a blank of any length at the end of a text.
      smask: [sMASK], a blank of a sentence.
      eod: end of a document.
      sop: start of a generated span.
      eop: end of a generated span.
      enc: marks a context that is encoded only.
      dblock: marks a block that is decoded.
      eos: sentencepiece's end of sentence, an id among those of text.
    """

    mask: int = 150000
    gmask: int = 150001
    smask: int = 150002
    eod: int = 150003
    sop: int = 150004
    eop: int = 150005
    enc: int = 150006
    dblock: int = 150007
    eos: int = 20002

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        check_ranges(self, dict.fromkeys(names, _TOKEN_ID), "special_tokens.")

    @property
    def end_tokens(self) -> tuple[int, int]:
        """The tokens at which generation stops by default."""
        return (self.eop, self.eos)

    def text_ends(self, end_tokens: Sequence[int] | None = None) -> frozenset[int]:
        """Return the tokens before which the text of an answer ends: its end tokens, and eod.

        Models write eod before eop at the end of a document, so generation does not stop at it.

        Args:
          end_tokens: ids at which generation stops, None for the default.
        """
        return frozenset({self.eod, *(self.end_tokens if end_tokens is None else end_tokens)})

    def without_end(
        self, answer: Sequence[int], end_tokens: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """Return the text tokens of an answer: those before the token that ended it.

        Args:
          answer: generated token ids.
          end_tokens: ids at which generation stopped, None for the default.
        """
        ends = self.text_ends(end_tokens)
        return tuple(itertools.takewhile(lambda token: token not in ends, answer))


RELEASED_VOCAB_SIZE = 150528
_MAX_VOCAB_SIZE = 1 << 24
_TOKEN_ID = Range(int, 0, _MAX_VOCAB_SIZE - 1)
# Of `GLMConfig`: wider than any model, and small enough for the shapes of arrays.
RANGES = {
    "num_layers": Range(int, 1, 1 << 14),
    "hidden_size": Range(int, 1, 1 << 20),
    "inner_hidden_size": Range(int, 1, 1 << 22),
    "num_heads": Range(int, 1, 1 << 16),
    "vocab_size": Range(int, 1, _MAX_VOCAB_SIZE),
    "max_sequence_length": Range(int, 1, 1 << 24),
    "layernorm_epsilon": Range(float, 0, 1, without_low=True),
    "rotary_base": Range(float, 1, 1e12, without_low=True),
}


# How models of the family differ, and the one value of each that is implemented.
ARCHITECTURE: dict[str, Any] = {
    "norm": "layernorm",
    "residual": "deepnorm",
    "activation": "geglu",
    "positions": "rotary",
    "output_projection": "tied",
}


@dataclasses.dataclass(frozen=True)
class GLMConfig:
    """Architecture and number formats of one GLM model (arXiv:2210.02414, section 2.1).

    Attributes:
      num_layers: transformer blocks.
      hidden_size: width of the residual stream.
      inner_hidden_size: width of each half of the gated linear unit.
      num_heads: attention heads; hidden_size / num_heads must be even, for rotary positions.
      vocab_size: rows of the word embedding, including padding rows.
      max_sequence_length: position ids run from 0 to this, exclusive.
      layernorm_epsilon: added to the variance.
      rotary_base: base of the geometric rotary frequencies.
      rotary_dtype: "float16" rounds frequencies, angles, cosines and sines as the
        released model does; "float32" does not.
      param_dtype: of stored float parameters.
      compute_dtype: of activations and products; "tensorfloat32" is float32 with products that
        accelerators may round to fewer bits.
      softmax_dtype: of attention probabilities, before the product with the values.
      cache_dtype: of cached keys and values: a float dtype, or "int8" with a scale for each
        head and position; None for compute_dtype.
      special_tokens: ids of the tokens that are not text, None if unknown.
      norm: of a block's inputs: "layernorm" (`layers.layer_norm`).
      residual: order of norms and additions: "deepnorm", x = norm(x) * alpha + f(norm(x))
        (`glm.block`).
      activation: of the feed-forward layer: "geglu", which is gated (`kernels.geglu`).
      positions: "rotary" (`layers.apply_rotary`).
      output_projection: "tied", the word embedding (`glm.logits`).
      num_key_value_heads: None for num_heads, one for each query head.
    """

    num_layers: int
    hidden_size: int
    inner_hidden_size: int
    num_heads: int
    vocab_size: int = RELEASED_VOCAB_SIZE
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rotary_dtype: str = "float32"
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    softmax_dtype: str = "float32"
    cache_dtype: str | None = None
    special_tokens: SpecialTokens | None = None
    norm: str = "layernorm"
    residual: str = "deepnorm"
    activation: str = "geglu"
    positions: str = "rotary"
    output_projection: str = "tied"
    num_key_value_heads: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        for name, value in ARCHITECTURE.items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"{name}={shown(getattr(self, name))}: only {value!r} is implemented"
                )
        if self.num_key_value_heads not in (None, self.num_heads):
            raise ConfigError(
                f"num_key_value_heads={shown(self.num_key_value_heads)}: only num_heads="
                f"{self.num_heads} of them, or None for as many, are implemented"
            )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} does not divide into num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head size {self.head_dim} (hidden_size / num_heads) is odd: "
                "rotary positions need an even one"
            )
        choices = dict.fromkeys(("param_dtype", "softmax_dtype"), _FLOAT_DTYPES)
        for name, allowed in (choices | {"compute_dtype": COMPUTE_DTYPES}).items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: one of {allowed}")
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise ConfigError(f"cache_dtype={self.cache_dtype!r}: None or one of {CACHE_DTYPES}")
        if self.rotary_dtype not in _ROTARY_DTYPES:
            raise ConfigError(f"rotary_dtype={self.rotary_dtype!r}: one of {_ROTARY_DTYPES}")

    @property
    def activation_dtype(self) -> str:
        """The dtype of activations; see `compute_dtype`."""
        return array_dtype(self.compute_dtype)

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def residual_scale(self) -> float:
        """DeepNorm's alpha, sqrt(2 * layers) (arXiv:2210.02414, section 2.1)."""
        return math.sqrt(2.0 * self.num_layers)

    def __hash__(self) -> int:
        # Of a few fields: jax asks for it whenever it runs a program that takes the config.
        return hash((self.num_layers, self.hidden_size, self.max_sequence_length))

    def replace(self, **changes: Any) -> "GLMConfig":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Return the fields as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "GLMConfig":
        """Invert `to_json`.

        Raises:
          ConfigError: the text is not JSON, a field is unknown or missing, or a value is out of
            range.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"model config is not JSON: {parser_refusal(error)}") from error
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: Any) -> "GLMConfig":
        """Build a config from plain values.

        Raises:
          ConfigError: see `from_json`.
        """
        if not isinstance(fields, dict):
            raise ConfigError("model config is not a JSON object")
        fields = dict(fields)
        special = fields.get("special_tokens")
        if special is not None:
            if not isinstance(special, dict):
                raise ConfigError(f"special_tokens={shown(special)}: expected an object of ids")
            fields["special_tokens"] = _build(SpecialTokens, special)
        config: GLMConfig = _build(cls, fields)
        if config.special_tokens is not None:
            _check_special_tokens(config.special_tokens, config.vocab_size)
        return config


def _check_special_tokens(special: SpecialTokens, vocab_size: int) -> None:
    """Raise ConfigError for ids outside of a vocabulary, and for one that two tokens have."""
    names: dict[int, str] = {}
    for name, token in dataclasses.asdict(special).items():
        if token >= vocab_size:
            raise ConfigError(
                f"special_tokens.{name}={token}: the vocabulary ends at {vocab_size - 1}"
            )
        if token in names:
            raise ConfigError(f"special_tokens.{name}={token}: {names[token]} has the same id")
        names[token] = name


def _build(cls: Any, fields: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ConfigError(f"unknown field {shown(unknown[0])} in {cls.__name__}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error


_SIZES: dict[str, tuple[int, int, int, int]] = {
    # name: layers, hidden, inner (8/3 of hidden, in multiples of 128), heads
    "tiny": (2, 128, 384, 4),
    "125m": (14, 512, 1408, 8),
    "350m": (15, 1024, 2816, 16),
    "1b": (16, 2048, 5504, 16),
    "6b": (28, 4096, 11008, 32),
    "13b": (40, 5120, 13696, 40),
    "130b": (70, 12288, 32768, 96),
}
MODEL_SIZES = tuple(_SIZES)


def glm_config(size: str, **overrides: Any) -> GLMConfig:
    """Return the config of a named size, from "tiny" to "130b".

    The names count all parameters, including the embedding of 150,528 rows; "tiny" has a
    vocabulary of 512 and 128 positions.

    Raises:
      ConfigError: `size` is not one of `MODEL_SIZES`.
    """
    if size not in _SIZES:
        raise ConfigError(f"model size {size!r}: one of {', '.join(MODEL_SIZES)}")
    layers, hidden, inner, heads = _SIZES[size]
    fields: dict[str, Any] = dict(
        num_layers=layers, hidden_size=hidden, inner_hidden_size=inner, num_heads=heads
    )
    if size == "tiny":
        fields |= dict(vocab_size=512, max_sequence_length=128)
    else:
        fields |= dict(special_tokens=SpecialTokens())
    return GLMConfig(**(fields | overrides))


def glm_130b(**overrides: Any) -> GLMConfig:
    """Return the released model: 70 layers, hidden size 12288, 96 heads, float16 rotary tables."""
    released = dict(rotary_dtype="float16", param_dtype="float16", compute_dtype="float16")
    return glm_config("130b", **(released | overrides))
