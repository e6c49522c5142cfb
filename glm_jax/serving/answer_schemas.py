"""JSON schemas of answers, from which the OpenAPI document is made."""

from typing import Any, Literal

from pydantic import BaseModel, Field


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class LogProbabilities(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    text: str
    index: int
    logprobs: LogProbabilities | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """A whole answer, or one part of a stream, whose last part has a finish_reason."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None


class ChatAnswer(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """A whole answer. A stream's events are `chat.completion.chunk`s, whose choices have a `delta`
    instead of a `message`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(BaseModel):
    """The mean of a text's final hidden states, or base64 of its little-endian float32 numbers."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Embeddings in the order of the request."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Blank(BaseModel):
    text: str
    finish_reason: Literal["stop", "length"]


class Piece(BaseModel):
    """A piece of the whole text; `blank` is the number of the blank that it fills, or null."""

    text: str
    blank: int | None


class Filled(BaseModel):
    """A text with its blanks filled. A stream sends pieces first, and this at its end."""

    id: str
    object: Literal["fill"]
    created: int
    model: str
    text: str
    blanks: list[Blank]
    pieces: list[Piece]
    usage: Usage


class ScoredChoice(BaseModel):
    """A choice; its log-probability is the sum of its tokens', in nats."""

    index: int
    text: str
    logprob: float
    token_logprobs: list[float]
    is_greedy: bool = Field(description="whether each of its tokens is the most likely one")


class Scored(BaseModel):
    """Scores of choices, in the order of the request."""

    id: str
    object: Literal["score"]
    created: int
    model: str
    choices: list[ScoredChoice]
    best: int = Field(description="index of the likeliest choice")
    usage: Usage


class Tokens(BaseModel):
    tokens: list[int]
    count: int


class Detokenized(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    tokenizer_class: str
    eos_token: str


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = Field(description="of an adapter, the model that it belongs to")


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"]


class ErrorContent(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorContent


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Error, "description": "The request is wrong: one line says how."},
    "5XX": {"model": Error, "description": "The server failed: one line says how."},
}
