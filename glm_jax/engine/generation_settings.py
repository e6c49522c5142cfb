"""Settings of generation: one table of names, types, ranges, defaults and help.

Launch flags, lines of batch jobs, the server's schema and the table in docs/decoding.md are made
from it, and `Sampling` and `BeamSearch` check their values by it.
"""

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

from glm_jax.errors import UserError

Number = int | float
_MAX_COUNT = 1_000_000  # far above any model's positions and vocabulary, far below 2**31
_MAX_SHOWN = 40  # characters of a value in a message
MAX_BIASED = 300  # tokens whose logits a request has something added to
MAX_GUIDED_CHOICES = 1024


class SamplingError(UserError):
    """Settings that describe no way to choose a token."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
      kind: int, float, bool or str; of each item where it is a list. dict for a JSON object, which
        is checked into its text.
      default: where nothing else is said; None where it depends on the request.
      lowest, highest: range of a number, both inclusive.
      help: one line.
      max_items: of a list; None where it is no list.
      min_items: of a list that is given.
      is_for_search: whether a beam search takes it.
      is_by_token: whether it is a mapping of token ids to numbers, which is checked into a tuple of
        pairs; max_items is of these.
    """

    kind: type
    default: Any
    lowest: Number
    highest: Number
    help: str
    max_items: int | None = None
    is_for_search: bool = False
    is_by_token: bool = False
    min_items: int = 0

    @property
    def range(self) -> str:
        """The range in words; empty where there is none."""
        if self.kind not in (int, float):
            return ""
        return f"from {self.lowest:.10g} to {self.highest:.10g}"

    def checked(self, name: str, value: Any) -> Any:
        """Return a value in the setting's type.

        Raises:
          SamplingError: another type, or out of range; the message says `name`.
        """
        if self.max_items is None:
            return self._checked(value, f"{name}={_shown(value)}")
        if self.is_by_token:
            value = _pairs(name, value)
        elif not isinstance(value, list | tuple):
            raise SamplingError(f"{name}={_shown(value)}: expected a list, got {_kind(value)}")
        if len(value) > self.max_items:
            raise SamplingError(f"{name} holds {len(value)} items: at most {self.max_items}")
        if len(value) < self.min_items:
            raise SamplingError(f"{name} holds nothing: at least {self.min_items}, or leave it out")
        if self.is_by_token:
            said = lambda token, x: f"{name}={{{token}: {_shown(x)}}}"
            return tuple((token, self._checked(x, said(token, x))) for token, x in value)
        return tuple(self._checked(item, f"{name} holds {_shown(item)}") for item in value)

    def _checked(self, value: Any, said: str) -> Any:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if self.kind is dict:
            return _json_object(value, said)
        if self.kind in (bool, str):
            if not isinstance(value, self.kind):
                raise SamplingError(f"{said}: expected {self.kind.__name__}, got {_kind(value)}")
            if self.max_items is not None and value == "":
                raise SamplingError(f"{said}: expected a text that is not empty")
            return value
        if not is_number:
            raise SamplingError(f"{said}: expected {self.kind.__name__}, got {_kind(value)}")
        is_whole = isinstance(value, numbers.Integral) or float(value).is_integer()
        if self.kind is int and not is_whole and math.isfinite(value):
            raise SamplingError(f"{said}: expected int, got {_kind(value)}")
        if not self.lowest <= value <= self.highest:  # NaN is in no range
            raise SamplingError(f"{said}: {self.range}")
        return self.kind(value)


def _json_object(value: Any, said: str) -> str:
    """Return the text of a JSON object that is given as such, or as text."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise SamplingError(f"{said}: expected a JSON object: it is no JSON") from error
    if not isinstance(value, dict):
        raise SamplingError(f"{said}: expected a JSON object, got {_kind(value)}")
    return text


def _pairs(name: str, value: Any) -> list[tuple[int, Any]]:
    """Return the items of a mapping by token id, text in JSON; checked ones are pairs already."""
    try:
        pairs = list(value.items() if isinstance(value, Mapping) else value)
        ids = [int(token) for token, _ in pairs]
        are_ids = all(
            str(token) == str(i) and i >= 0 for i, (token, _) in zip(ids, pairs, strict=True)
        )
    except (TypeError, ValueError):
        are_ids = False
    if not are_ids:
        raise SamplingError(f"{name}={_shown(value)}: expected token ids with a number for each")
    return [(i, x) for i, (_, x) in zip(ids, pairs, strict=True)]


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        text = f"a {_kind(value)}"
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _kind(value: Any) -> str:
    return type(value).__name__


def _number(
    kind: type,
    default: Any,
    lowest: Number,
    highest: Number,
    help: str,
    is_for_search: bool = False,
) -> Any:
    row = Setting(kind, default, lowest, highest, help, None, is_for_search)
    return dataclasses.field(default=default, metadata={"setting": row})


def _switch(help: str, is_for_search: bool = False) -> Any:
    row = Setting(bool, False, 0, 1, help, None, is_for_search)
    return dataclasses.field(default=False, metadata={"setting": row})


def _list(kind: type, max_items: int, highest: Number, help: str, min_items: int = 0) -> Any:
    row = Setting(kind, (), 0, highest, help, max_items, min_items=min_items)
    return dataclasses.field(default=(), metadata={"setting": row})


def _text(kind: type, help: str) -> Any:
    row = Setting(kind, None, 0, 0, help)
    return dataclasses.field(default=None, metadata={"setting": row})


def _by_token(max_items: int, lowest: Number, highest: Number, help: str) -> Any:
    row = Setting(float, (), lowest, highest, help, max_items, is_by_token=True)
    return dataclasses.field(default=(), metadata={"setting": row})


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How a text's blanks are filled: the table itself. `SETTINGS` has its rows by name.

    Raises:
      SamplingError: a value of another type, or out of range.
    """

    temperature: float = _number(
        float, 0.0, 0, 100, "divides the logits; 0 takes the most likely token"
    )
    top_k: int = _number(int, 0, 0, _MAX_COUNT, "keep only the k most likely tokens; 0 keeps all")
    top_p: float = _number(
        float, 0.0, 0, 1, "keep the most likely tokens up to this probability; 0 keeps all"
    )
    min_p: float = _number(
        float,
        0.0,
        0,
        1,
        "keep tokens of at least this share of the top probability; 0 keeps all",
    )
    repetition_penalty: float = _number(
        float, 1.0, 0.01, 1e6, "above 1: tokens that were there before are less likely; 1 for none"
    )
    presence_penalty: float = _number(
        float, 0.0, -2, 2, "taken off the logits of tokens that the answer has already"
    )
    frequency_penalty: float = _number(
        float, 0.0, -2, 2, "taken off a token's logit as often as the answer has it already"
    )
    logit_bias: tuple[tuple[int, float], ...] = _by_token(
        MAX_BIASED, -100, 100, "added to the logits of tokens, given by their ids"
    )
    no_repeat_ngram: int = _number(
        int, 0, 0, _MAX_COUNT, "n tokens in a row never come twice; 0 for no such ban", True
    )
    min_tokens: int = _number(int, 0, 0, _MAX_COUNT, "tokens before an answer's text may end", True)
    max_tokens: int | None = _number(
        int, None, 1, _MAX_COUNT, "tokens of an answer; by default up to the maximum length", True
    )
    banned_tokens: tuple[int, ...] = _list(
        int, _MAX_COUNT, 2**31 - 1, "ids of tokens that come in no answer"
    )
    banned_texts: tuple[str, ...] = _list(str, 32, 0, "texts that come in no answer")
    guided_choice: tuple[str, ...] = _list(
        str, MAX_GUIDED_CHOICES, 0, "the answer is one of these texts", min_items=1
    )
    guided_regex: str | None = _text(str, "the answer matches this regular expression as a whole")
    guided_json: str | None = _text(dict, "the answer is JSON that fits this JSON schema")
    num_beams: int = _number(int, 1, 1, 128, "above 1: beam search, which takes no sampling", True)
    length_penalty: float = _number(
        float, 1.0, -10, 10, "of beam search; higher favours longer answers", True
    )
    seed: int | None = _number(
        int, None, 0, 2**32 - 1, "of sampling; by default made from the job's and the index", True
    )
    log_probabilities: bool = _switch("give those of the generated tokens")
    priority: int = _number(
        int, 0, -1000, 1000, "of requests that wait, those of lower numbers go first", True
    )
    unidirectional: bool = _switch(
        "the text, without masks, is seen from left to right", is_for_search=True
    )

    def __post_init__(self) -> None:
        check_settings(self)


SETTINGS: dict[str, Setting] = {
    field.name: field.metadata["setting"] for field in dataclasses.fields(GenerationSettings)
}


def check_settings(values: Any) -> None:
    """Check those fields of a dataclass that the table has.

    Raises:
      SamplingError: a value of another type, or out of range.
    """
    for name, setting in SETTINGS.items():
        value = getattr(values, name, setting.default)
        if value is not setting.default:
            setting.checked(name, value)
