"""A text with blanks and its settings: the request of a user, from a terminal, a file or HTTP."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.generation_settings import SETTINGS, GenerationSettings, Setting
from glm_jax.engine.sampling import Sampling
from glm_jax.errors import UserError, shown
from glm_jax.generation.grammars import Grammar, compile_grammar

MAX_CHOICES = 128
_FIELDS = SETTINGS | {
    "text": Setting(str, "", 0, 0, "with blanks"),
    "choices": Setting(str, (), 0, 0, "for the one blank of the text", MAX_CHOICES),
    "adapter": Setting(str, "", 0, 0, "name of the one that answers"),
}


_GUIDED = ("guided_choice", "guided_regex", "guided_json")


class RequestError(UserError):
    """Fields that are not a request; the message names the wrong one."""


@dataclasses.dataclass(frozen=True)
class TextRequest(GenerationSettings):
    """A text with blanks and how to fill them.

    Attributes:
      choices: for its one blank, which is then filled with the likeliest of them; settings of how
        tokens are chosen change nothing.
      adapter: name of the one that answers; empty for the model without any.
    """

    text: str = ""
    choices: tuple[str, ...] = ()
    adapter: str = ""

    def choice(self, encode: Callable[[str], Sequence[int]]) -> Sampling | BeamSearch:
        """Return how tokens are chosen.

        Args:
          encode: a tokenizer's.

        Raises:
          SamplingError: a banned text without tokens.
          RequestError: num_beams beside a setting that beam search does not take.
          UserError: a banned text that the tokenizer cannot encode.
        """
        if self.num_beams != 1:
            self._check_beams()
            return BeamSearch(**self._settings_of(BeamSearch))
        banned = tuple(tuple(encode(text)) for text in self.banned_texts)
        return Sampling(**self._settings_of(Sampling), banned_sequences=banned)

    def guide(self, tokenizer: Any) -> Grammar | None:
        """Return what an answer must be; None for anything.

        Raises:
          RequestError: several settings that say so.
          GrammarError: one that cannot be understood or followed.
        """
        names = [name for name in _GUIDED if getattr(self, name) != SETTINGS[name].default]
        if not names:
            return None
        if len(names) > 1:
            raise RequestError(f"{names[1]} beside {names[0]}: give one of the two")
        [name] = names
        source = SETTINGS[name].checked(name, getattr(self, name))
        return compile_grammar(tokenizer, name, source)

    def _settings_of(self, choice: type) -> dict[str, Any]:
        """Return the table's settings that a dataclass has."""
        names = (field.name for field in dataclasses.fields(choice))
        return {name: getattr(self, name) for name in names if name in SETTINGS}

    def _check_beams(self) -> None:
        for name, setting in SETTINGS.items():
            value = getattr(self, name)
            if not setting.is_for_search and value != setting.default:
                raise RequestError(
                    f"{name}={shown(value)} beside num_beams={self.num_beams}: a search for the "
                    "best answers takes no such setting"
                )

    def with_fields(self, fields: Mapping[str, Any]) -> "TextRequest":
        """Return the request with some settings replaced. One of guided_choice, guided_regex and
        guided_json takes the place of the others.

        Raises:
          RequestError: an unknown field.
          SamplingError: a value of another type, or out of range.
        """
        changes: dict[str, Any] = {}
        if not fields.keys().isdisjoint(_GUIDED):
            changes |= {name: SETTINGS[name].default for name in _GUIDED}
        for name, value in fields.items():
            if name not in _FIELDS:
                raise RequestError(f"unknown field {shown(name)}; put your own under 'metadata'")
            changes[name] = _FIELDS[name].checked(name, value)
        return dataclasses.replace(self, **changes)
