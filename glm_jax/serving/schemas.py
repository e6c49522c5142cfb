"""JSON schemas of requests, from which the OpenAPI document is made."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from glm_jax.engine.generation_settings import SETTINGS, Number
from glm_jax.engine.slots import MAX_TOP_LOGPROBS
from glm_jax.generation.text_request import MAX_CHOICES

_STOPS = 4
_PROMPTS = 4096  # in one request; a server may accept fewer
_EMBEDDED = 2048  # texts, as many as OpenAI's interface takes
_MAX_SHOWN = 40  # characters of a client's own that an error repeats


def _whole(value: Any) -> Any:
    """Convert a float without a fraction to int: to JSON 2.0 and 2 are the same."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _within(name: str, ge: Number | None = None, le: Number | None = None) -> Any:
    """Return the range of one of `SETTINGS`, with OpenAI's own bound if there is one."""
    setting = SETTINGS[name]
    return Field(ge=setting.lowest if ge is None else ge, le=setting.highest if le is None else le)


def _of_table(name: str) -> Any:
    """Return an optional field with the help of one of `SETTINGS`."""
    return Field(None, description=SETTINGS[name].help)


_WHOLE = BeforeValidator(_whole)
Name = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1), _WHOLE]
Seed = Annotated[int, Field(ge=1 - 2**53, le=2**53 - 1), _WHOLE]  # exact in JSON
Count = Annotated[int, Field(ge=1, le=128), _WHOLE]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), _WHOLE]
Temperature = Annotated[float, _within("temperature", le=2)]
Probability = Annotated[float, _within("top_p")]
Beams = Annotated[int, _within("num_beams"), _WHOLE]
MaxTokens = Annotated[int, _within("max_tokens"), _WHOLE]
Priority = Annotated[int, _within("priority"), _WHOLE]
User = Annotated[str, Field(max_length=1024)]
Choice = Annotated[str, Field(min_length=1)]


# Lists may be long: their first error is enough.
_Item = TypeVar("_Item")
_List = Annotated[list[_Item], Field(min_length=1, fail_fast=True)]
_Prompts = Annotated[list[_Item], Field(min_length=1, max_length=_PROMPTS, fail_fast=True)]
_Embedded = Annotated[list[_Item], Field(min_length=1, max_length=_EMBEDDED, fail_fast=True)]


class _Strict(BaseModel):
    """A JSON object of exactly these fields and types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False


# Settings that requests have in OpenAI's form, under another name, or not at all.
_NOT_OURS = (
    "temperature",
    "top_p",
    "max_tokens",
    "num_beams",
    "seed",
    "log_probabilities",
    "banned_tokens",
    "unidirectional",
    "priority",
)
OUR_SETTINGS = tuple(name for name in SETTINGS if name not in _NOT_OURS)


def _field_of_table(name: str) -> Any:
    """Return an optional field with the type, range and help of one of `SETTINGS`."""
    setting = SETTINGS[name]
    if setting.is_by_token:
        pairs = Field(None, max_length=setting.max_items, description=setting.help)
        return dict[Name, Annotated[float, _within(name)]] | None, pairs
    if setting.max_items is not None:
        items = Field(
            None,
            min_length=setting.min_items,
            max_length=setting.max_items,
            description=setting.help,
        )
        return list[Choice] | None, items
    kinds: dict[type, Any] = {
        int: Annotated[int, _within(name), _WHOLE],
        str: str,
        dict: dict[str, Any] | str,
    }
    kind = kinds.get(setting.kind, Annotated[float, _within(name)])
    return kind | None, _of_table(name)


if TYPE_CHECKING:
    _OfTable = _Strict
else:
    _OfTable = create_model(
        "_OfTable", __base__=_Strict, **{name: _field_of_table(name) for name in OUR_SETTINGS}
    )


class JsonSchema(_Strict):
    """A JSON schema of OpenAI's `response_format`, which is followed strictly in any case."""

    name: Name | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """OpenAI's `response_format`: any text, a JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is for the type json_schema, which needs it")
        return self

    @property
    def guided_json(self) -> dict[str, Any] | None:
        """The JSON schema of an answer; None for any text."""
        if self.type == "text":
            return None
        schema = None if self.json_schema is None else self.json_schema.json_schema
        return {"type": "object"} if schema is None else schema


class _Choosing(_OfTable):
    """Settings of generation that OpenAI's interface does not have."""

    response_format: ResponseFormat | None = Field(
        None, description="as guided_json, in OpenAI's form"
    )
    unidirectional: bool | None = _of_table("unidirectional")
    priority: Priority | None = _of_table("priority")


class _Answered(_Choosing):
    """What OpenAI's completion and chat requests have in common."""

    model: Name
    temperature: Temperature | None = 1.0
    top_p: Probability | None = 1.0
    num_beams: Beams | None = _of_table("num_beams")
    n: Count | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_STOPS)] | None = None
    seed: Seed | None = None
    user: User | None = None


# What a beam search does not take, and values of it that ask for nothing.
_OF_SAMPLING = {"temperature", "top_p", "seed", "stop", "logprobs", "stream"} | {
    name for name, setting in SETTINGS.items() if not setting.is_for_search
}
_UNSET = {name: (None, setting.default) for name, setting in SETTINGS.items()} | {
    "temperature": (None, 0),
    "top_p": (None, 0),
    "seed": (None,),
    "stream": (None, False),
}


class CompletionRequest(_Answered):
    """OpenAI's completion request. A prompt may have one blank, [MASK], [sMASK] or [gMASK];
    without one, the answer continues it."""

    prompt: str | _Prompts[str] | _List[Token] | _Prompts[_List[Token]]
    suffix: str | None = Field(None, description="text after the blank that is filled")
    max_tokens: Annotated[int, _within("max_tokens", ge=0), _WHOLE] | None = 16
    best_of: Count | None = Field(
        None,
        description="answers that are generated, of which the n with the highest log-probability "
        "per token are given; n by default. Without settings of sampling they are found by a beam "
        "search of that width",
    )
    logprobs: TopLogprobs | None = None
    echo: bool | None = False

    @property
    def beams(self) -> int | None:
        """The width of a beam search, by either name; None for sampling."""
        if self.num_beams is not None or self.best_of in (None, 1):
            return self.num_beams
        given = {name: getattr(self, name) for name in self.model_fields_set & _OF_SAMPLING}
        is_sampled = any(value not in _UNSET.get(name, (None,)) for name, value in given.items())
        return None if is_sampled else self.best_of


class TextPart(_Strict):
    type: Literal["text"]
    text: str


def _only_text(value: Any) -> Any:
    """Refuse content parts of other types in a line of their own."""
    for part in value if isinstance(value, list) else ():
        kind = part.get("type") if isinstance(part, dict) else "text"
        if kind != "text" and isinstance(kind, str):
            message = f"a content part of type {kind[:_MAX_SHOWN]!a}: only text is read"
            raise PydanticCustomError("content_part", "{message}", {"message": message})
    return value


class Message(_Strict):
    """A message of a chat; content parts are joined by line feeds. Fields that are always null are
    those of answers, which clients send back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | _List[TextPart], BeforeValidator(_only_text)]
    name: Name | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class ChatRequest(_Answered):
    """OpenAI's chat request. The server's chat template makes a prompt of the messages, which is
    completed as by `CompletionRequest`."""

    messages: _List[Message]
    max_completion_tokens: MaxTokens | None = _of_table("max_tokens")
    max_tokens: MaxTokens | None = Field(None, description="another name of it")
    logprobs: bool | None = False
    top_logprobs: TopLogprobs | None = None


class EmbeddingRequest(_Strict):
    """Texts to embed. Words such as [MASK] in them are text as any other."""

    model: Name
    input: str | _Embedded[str] | _List[Token] | _Embedded[_List[Token]]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1), _WHOLE] | None = Field(
        None, description="of an embedding: the model's hidden size, and no other number"
    )
    priority: Priority | None = _of_table("priority")
    user: User | None = None


class FillRequest(_Choosing):
    """A text whose blanks are to be filled from left to right: each [MASK]; if there is none, each
    [sMASK]; otherwise one [gMASK], which is added at the end of a text without a mask."""

    text: str
    model: Name | None = None
    max_tokens: MaxTokens | None = _of_table("max_tokens")
    temperature: Temperature | None = Field(
        SETTINGS["temperature"].default, description=SETTINGS["temperature"].help
    )
    top_p: Probability | None = 1.0
    num_beams: Beams | None = _of_table("num_beams")
    stream: bool | None = False
    seed: Seed | None = None


class ScoreRequest(_Strict):
    """A text with one blank, as `CompletionRequest.prompt`, and choices to fill it with."""

    context: str
    choices: Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES)]
    model: Name | None = None
    unidirectional: bool | None = _of_table("unidirectional")
    priority: Priority | None = _of_table("priority")
    user: User | None = None


class TokenizeRequest(_Strict):
    """A text, as `text` or `prompt`. Words such as [MASK] are special tokens in any case."""

    text: str | None = None
    prompt: str | None = Field(None, description="another name of text")
    model: Name | None = None
    add_special_tokens: bool | None = Field(None, description="ignored: none are added")


class DetokenizeRequest(_Strict):
    tokens: _List[Token]
    model: Name | None = None
