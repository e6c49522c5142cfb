"""Text to ids and back: a sentencepiece model under icetk's id layout.

icetk gives ids below 20,000 to images, then come the sentencepiece ids, then the
special tokens. Line breaks, tabs and runs of blanks are written as symbols of the
sentencepiece vocabulary, so that they survive its normalisation.
"""

import dataclasses
import io
import json
import operator
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.errors import UserError, shown
from glm_jax.files import read_json, replacing, write_text
from glm_jax.text_files import check_characters

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
LINE_BREAK, TAB = "<n>", "<|tab|>"
BLANK_WORDS = re.compile(r"<n>|<\|tab\|>|<\|blank_\d\d?\|>")  # to decoding, however spelled
_SPACE_MARK = "\u2581"
_MAX_BLANKS = 80
_MAX_ID = 2**31 - 1
# sentencepiece leaves out a line with one of these without a word, and one past its limit.
_UNTRAINABLE = re.compile("[\u2585\0]")
_MAX_LINE_BYTES = 1 << 16
_BYTE_PIECES = 300  # bytes, blanks and what sentencepiece always has
_SPECIAL_TEXTS = {
    "[MASK]": "mask",
    "[gMASK]": "gmask",
    "[sMASK]": "smask",
    "<eod>": "eod",
    "<sop>": "sop",
    "<eop>": "eop",
    "<ENC>": "enc",
    "<dBLOCK>": "dblock",
}
# What stands for a special token in a text that is encoded.
CONTROL_WORDS = tuple(_SPECIAL_TEXTS)
MASK_WORDS = ("[MASK]", "[gMASK]", "[sMASK]")


class TokenizerError(UserError):
    """A tokenizer file that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where the ids of a sentencepiece model lie.

    Attributes:
      text_offset: added to sentencepiece ids (icetk: 20000 image ids come first).
      special_tokens: ids of the tokens that are not text.
      segments: how text after a special token is encoded. "separate": by itself, as the
        released model had it, with sentencepiece's leading blank. "continued": as it
        would be inside a running text, so that a blank in the middle of a sentence looks
        in a prompt as it did in training.
    """

    text_offset: int = 20000
    special_tokens: SpecialTokens = dataclasses.field(default_factory=SpecialTokens)
    segments: str = "separate"

    @classmethod
    def for_vocabulary(cls, num_text_tokens: int) -> "TokenizerConfig":
        """Return the same layout for a small vocabulary: text first, then special tokens."""
        names = [f.name for f in dataclasses.fields(SpecialTokens) if f.name != "eos"]
        ids = {name: num_text_tokens + i for i, name in enumerate(names)}
        return cls(0, SpecialTokens(**ids, eos=2), "continued")


class Piece(NamedTuple):
    """A token of text.

    Attributes:
      text: UTF-8, of a byte piece a part of a character.
      is_spaced: whether it begins with the mark of a space, which decoding leaves out at first.
    """

    text: bytes
    is_spaced: bool


class Tokenizer:
    """Encodes text with special tokens in it and decodes ids.

    Attributes:
      special_tokens: ids of the tokens that are not text.
      vocab_size: one more than the greatest id.
      files: the files that it was read from.

    Raises:
      TokenizerError: a file is missing or no sentencepiece model, or ids overlap.
    """

    def __init__(self, path: str | os.PathLike[str], config: TokenizerConfig | None = None):
        """Read a folder (`tokenizer.model`, `tokenizer_config.json`) or a .model file.

        Args:
          config: the id layout; by default that of the config file beside the model, or
            icetk's where there is none.
        """
        model = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
        if not model.is_file():
            raise TokenizerError(f"{model} is missing: give a sentencepiece model file")
        config_file = model.with_name(CONFIG_FILE)
        self.files: tuple[Path, ...] = (model,)
        if config is None and config_file.exists():
            config = _read_config(config_file)
            self.files = (model, config_file)
        self._config = config or TokenizerConfig()
        config_ids = {"text_offset": self._config.text_offset}
        _check_ids(config_ids | vars(self._config.special_tokens), self.files[-1])
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model.read_bytes())
        except RuntimeError as error:
            raise TokenizerError(f"{model} is not a sentencepiece model") from error
        except OSError as error:
            raise TokenizerError(f"{model}: {error.strerror}") from error
        self.special_tokens = self._config.special_tokens
        self._special_ids = {
            getattr(self.special_tokens, name): text for text, name in _SPECIAL_TEXTS.items()
        }
        self._text_ids = range(
            self._config.text_offset, self._config.text_offset + self._processor.GetPieceSize()
        )
        inside = [text for token, text in self._special_ids.items() if token in self._text_ids]
        if inside or len(self._special_ids) < len(_SPECIAL_TEXTS):
            raise TokenizerError(
                f"{model}: the text ids {self._text_ids.start} to {self._text_ids.stop - 1} and "
                f"the special tokens overlap ({inside[0] if inside else 'two share an id'})"
            )
        special_ids = dataclasses.astuple(self.special_tokens)
        self.vocab_size = 1 + max(*special_ids, self._text_ids.stop - 1)
        self._continued_prefix = self._encode_pieces(LINE_BREAK)

    def encode(self, text: str, control_words: tuple[str, ...] = CONTROL_WORDS) -> list[int]:
        """Ids of a text.

        Args:
          control_words: those of `CONTROL_WORDS` that become special ids; the others are text
            as any other. None of them, (), for texts that only speak of them: documents,
            answers, choices.

        Raises:
          TextFileError: the text has half of a character.
        """
        check_characters(text)  # sentencepiece would end in an error of its binding
        ids: list[int] = []
        parts = _split(text, control_words)
        for i, part in enumerate(parts):
            if part in control_words:
                ids.append(getattr(self.special_tokens, _SPECIAL_TEXTS[part]))
            elif self._config.segments == "separate":
                ids.extend(self._encode_pieces(part))
            else:
                ids.extend(self._encode_continued(part, i == 0, i == len(parts) - 1))
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids; special tokens appear by name unless they are skipped.

        Raises:
          TokenizerError: an id that is negative, or no integer.
        """
        return "".join(self._decoded_runs(ids, skip_special_tokens))

    def pieces(self) -> dict[int, Piece]:
        """Return the pieces of all ids that are text."""
        processor, pieces = self._processor, dict[int, Piece]()
        for number in range(processor.GetPieceSize()):
            name = processor.IdToPiece(number)
            if processor.IsByte(number):
                text = bytes([int(name[1:-1], 16)])
            else:
                text = _restore_blanks(name.replace(_SPACE_MARK, " ")).encode()
            is_text = not (processor.IsControl(number) or processor.IsUnknown(number))
            if is_text and not processor.IsUnused(number):
                piece = Piece(text, is_spaced=name.startswith(_SPACE_MARK))
                pieces[self._config.text_offset + number] = piece
        return pieces

    def _encode_pieces(self, text: str) -> list[int]:
        if not text:
            return []
        pieces = self._processor.EncodeAsIds(_protect_blanks(text))
        return [self._config.text_offset + piece for piece in pieces]

    def _encode_continued(self, part: str, is_first: bool, is_last: bool) -> list[int]:
        """Return a part of a running text. The blank before a special token belongs to what will
        fill it, because a word's blank is part of its piece."""
        if not is_last and part.endswith(" ") and not part.endswith("  "):
            part = part[:-1]
        if not part or is_first:
            return self._encode_pieces(part)
        return self._encode_pieces(LINE_BREAK + part)[len(self._continued_prefix) :]

    def _decoded_runs(self, ids: Iterable[int], skip_special_tokens: bool) -> Iterator[str]:
        run: list[int] = []
        is_continued = False
        for token in map(checked_id, ids):
            if token in self._text_ids:
                run.append(token - self._config.text_offset)
                continue
            yield self._decode_run(run, is_continued)
            run, is_continued = [], self._config.segments == "continued"
            if not skip_special_tokens:
                yield self._special_ids.get(token, f"<|{token}|>")
        yield self._decode_run(run, is_continued)

    def _decode_run(self, pieces: list[int], is_continued: bool) -> str:
        if not pieces:
            return ""
        if is_continued:
            prefix = [token - self._config.text_offset for token in self._continued_prefix]
            return _restore_blanks(self._processor.DecodeIds(prefix + pieces))[1:]
        return _restore_blanks(self._processor.DecodeIds(pieces))


def checked_id(token: Any) -> int:
    """Return a token's id as an int.

    Raises:
      TokenizerError: it is negative, or no integer.
    """
    is_integer = hasattr(token, "__index__") and not isinstance(token, bool)
    try:
        number = operator.index(token) if is_integer else -1
    except TypeError:  # an array of several, or of floats
        number = -1
    if number < 0:
        raise TokenizerError(f"{token!r} is no token: expected an integer of at least 0")
    return number


def check_fits(tokenizer: Any, config: GLMConfig) -> None:
    """Check that a tokenizer is one of a model; before its weights are read.

    Args:
      tokenizer: has `special_tokens` and, where it knows, `vocab_size`.

    Raises:
      TokenizerError: it has ids that the model does not have, or other special tokens.
    """
    special: SpecialTokens = tokenizer.special_tokens
    named = dataclasses.asdict(special)
    outside = [name for name, token in named.items() if not 0 <= token < config.vocab_size]
    size = getattr(tokenizer, "vocab_size", 0)
    advice = "give the model's own tokenizer"
    files: Sequence[Path] = getattr(tokenizer, "files", ())
    if len(files) == 1:
        advice += f" ({files[0]} has no {CONFIG_FILE} beside it)"
    if outside:
        raise TokenizerError(
            f"the tokenizer does not fit the model: its {outside[0]} is {named[outside[0]]}, and "
            f"the model's vocabulary ends at {config.vocab_size - 1}: {advice}"
        )
    if size > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer does not fit the model: it has {size} ids, and the model's "
            f"vocabulary {config.vocab_size}: {advice}"
        )
    of_model = named if config.special_tokens is None else dataclasses.asdict(config.special_tokens)
    other = [name for name, token in named.items() if of_model[name] != token]
    if other:
        raise TokenizerError(
            f"the tokenizer does not fit the model: its {other[0]} is {named[other[0]]}, and the "
            f"model's is {of_model[other[0]]}: {advice}"
        )


def save_tokenizer(folder: str | os.PathLike[str], model: bytes, config: TokenizerConfig) -> None:
    """Write a sentencepiece model and its id layout, the form that `Tokenizer` reads."""
    path = Path(folder)
    # The model last: alone it would be read with another id layout.
    write_text(path / CONFIG_FILE, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    with replacing(path / MODEL_FILE) as partial:
        partial.write_bytes(model)


def train_tokenizer(
    texts: Iterable[str], folder: str | os.PathLike[str], num_text_tokens: int
) -> "Tokenizer":
    """Learns a unigram sentencepiece model with byte fallback and writes it to a folder.

    Text comes back as it was: nothing is normalised, and blanks are kept.

    Args:
      texts: documents; a line is a sentence to sentencepiece.
      num_text_tokens: pieces of text, the 256 bytes and the blank symbols included; fewer
        are made where the texts don't hold as many.

    Raises:
      TokenizerError: no text, or fewer pieces asked for than characters need.
      TextFileError: half of a character in a text.
    """
    lines = [line for text in texts for line in _training_lines(text)]
    if not lines:
        raise TokenizerError("no text to train a tokenizer on")
    model = io.BytesIO()
    blanks = [_blanks(n) for n in range(2, 9)]
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=num_text_tokens,
            hard_vocab_limit=False,
            model_type="unigram",
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=[LINE_BREAK, TAB, *blanks],
            max_sentence_length=_MAX_LINE_BYTES,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise TokenizerError(f"sentencepiece: {error}") from error
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.getvalue())
    config = TokenizerConfig.for_vocabulary(processor.GetPieceSize())
    save_tokenizer(folder, model.getvalue(), config)
    return Tokenizer(folder)


def _training_lines(text: str) -> Iterator[str]:
    """Lines of a text, long ones in parts, such that sentencepiece learns from all of them."""
    check_characters(text)
    length = _MAX_LINE_BYTES // 4 - 1  # a character is up to four bytes
    for line in _protect_blanks(text).split(LINE_BREAK):
        for part in filter(None, _UNTRAINABLE.split(line)):
            yield from (part[at : at + length] for at in range(0, len(part), length))


def _split(text: str, words: tuple[str, ...]) -> list[str]:
    """Return a text cut before and after each of some words."""
    return re.split("(" + "|".join(map(re.escape, words)) + ")", text) if words else [text]


def byte_tokenizer(special_tokens: SpecialTokens, vocab_size: int) -> Tokenizer:
    """Return a stand-in for a model without a tokenizer of its own: each byte of a text is a token.

    Args:
      vocab_size: of the model. Ids that no byte has are decoded as "<|ID|>".
    """
    has_images = vocab_size > TokenizerConfig.text_offset + _BYTE_PIECES
    config = TokenizerConfig(TokenizerConfig.text_offset if has_images else 0, special_tokens)
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer([" "], folder, _BYTE_PIECES)
        return Tokenizer(folder, config)


def _blanks(count: int) -> str:
    return f"<|blank_{count}|>"


def _protect_blanks(text: str) -> str:
    text = text.replace("\n", LINE_BREAK).replace("\t", TAB)
    return re.sub(f" {{2,{_MAX_BLANKS}}}", lambda run: _blanks(len(run[0])), text)


def _restore_blanks(text: str) -> str:
    text = re.sub(r"<\|blank_(\d\d?)\|>", lambda match: " " * int(match[1]), text)
    return text.replace(TAB, "\t").replace(LINE_BREAK, "\n")


def _read_config(path: Path) -> TokenizerConfig:
    fields = read_json(path, TokenizerError, f"{path} is missing")
    ids = fields.get("special_tokens") if isinstance(fields, dict) else None
    if not isinstance(ids, dict):
        raise TokenizerError(f"{path}: expected an object whose special_tokens are an object")
    for found, kind in ((fields, TokenizerConfig), (ids, SpecialTokens)):
        unknown = sorted(found.keys() - {field.name for field in dataclasses.fields(kind)})
        if unknown:
            raise TokenizerError(f"{path}: unknown field {shown(unknown[0])}")
    _check_ids({"text_offset": fields.get("text_offset", 0)} | ids, path)
    config = TokenizerConfig(**fields | {"special_tokens": SpecialTokens(**ids)})
    if config.segments not in ("separate", "continued"):
        raise TokenizerError(
            f'{path}: segments={shown(config.segments)}: "separate" or "continued"'
        )
    return config


def _check_ids(ids: dict[str, Any], path: Path) -> None:
    for name, token in ids.items():
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= _MAX_ID:
            raise TokenizerError(
                f"{path}: {name}={shown(token)}: expected an int from 0 to {_MAX_ID}"
            )
