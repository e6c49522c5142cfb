"""OpenAI's chat requests: messages become a prompt by the server's template, which is completed."""

import itertools
from collections.abc import Iterator
from typing import Any

from glm_jax.serving.completions import CompletionRun
from glm_jax.serving.errors import refused
from glm_jax.serving.schemas import ChatRequest, CompletionRequest, Message
from glm_jax.serving.service import Service

_NO_TEMPLATE = (
    "this server has no chat template: start it with --chat_template=FILE, such as "
    "configs/chat/dialogue.jinja, or give a prompt to /v1/completions"
)


class ChatRun(CompletionRun):
    """A chat request while it is answered: the completion of the prompt that its messages make."""

    chunk_kind = "chat.completion.chunk"
    prompt_field = "messages"

    def __init__(self, service: Service, request: ChatRequest):
        """Check a request, make its prompt and tokenise it.

        Raises:
          HTTPException, UserError: it cannot be answered.
        """
        completion = _completion_request(service, request)
        super().__init__(service, completion, "chat.completion")
        self._num_top = request.top_logprobs or 0
        self._begun = set[int]()  # indices of the choices whose role was sent

    def _parts(self, piece: dict[str, Any]) -> Iterator[dict[str, Any]]:
        part = {"index": piece["index"], "logprobs": None, "finish_reason": None}
        if piece["index"] not in self._begun:
            self._begun.add(piece["index"])
            yield part | {"delta": {"role": "assistant", "content": ""}}
        log_probabilities = _log_probabilities(piece["logprobs"], self._num_top)
        if piece["text"] or (log_probabilities or {}).get("content"):
            delta = {"content": piece["text"]}
            yield part | {"delta": delta, "logprobs": log_probabilities}
        if piece["finish_reason"] is not None:
            yield part | {"delta": {}, "finish_reason": piece["finish_reason"]}

    def _whole_choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "index": choice["index"],
            "message": {"role": "assistant", "content": choice["text"], "refusal": None},
            "logprobs": _log_probabilities(choice["logprobs"], self._num_top),
            "finish_reason": choice["finish_reason"],
        }


def _completion_request(service: Service, request: ChatRequest) -> CompletionRequest:
    """Return the completion request whose answer is that to a chat request."""
    service.adapter_of(request.model)
    if service.settings.chat_template is None:
        raise refused(400, _NO_TEMPLATE, "messages", "no_chat_template")
    tokenizer = service.worker.ready_model().tokenizer
    max_tokens = request.max_completion_tokens
    if None not in (max_tokens, request.max_tokens) and max_tokens != request.max_tokens:
        message = "max_tokens beside max_completion_tokens: leave out one"
        raise refused(400, message, "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise refused(400, "top_logprobs without logprobs: set it to true", "top_logprobs")
    prompt = service.settings.chat_template.render(
        [_as_variable(message) for message in request.messages],
        bos_token="",
        eos_token=tokenizer.decode([tokenizer.special_tokens.eop]),
    )
    common = request.model_fields_set & CompletionRequest.model_fields.keys()
    fields = {name: getattr(request, name) for name in common}
    fields |= {
        "prompt": prompt,
        "max_tokens": request.max_tokens if max_tokens is None else max_tokens,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
    }
    return CompletionRequest(**fields)


def _as_variable(message: Message) -> dict[str, Any]:
    """Return a message as templates take it, its parts joined by line feeds."""
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    named = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": content} | named


def _log_probabilities(named: dict[str, Any] | None, num_top: int) -> dict[str, Any] | None:
    """Return a completion's log-probabilities in the form of a chat's.

    Args:
      num_top: likeliest tokens that each token has beside it; a completion may have one more, the
        chosen one.
    """
    if named is None:
        return None
    content = [
        _named(token, value)
        | {"top_logprobs": [_named(*item) for item in itertools.islice(top.items(), num_top)]}
        for token, value, top in zip(
            named["tokens"],
            named["token_logprobs"],
            named["top_logprobs"] or itertools.repeat({}),
            strict=False,
        )
    ]
    return {"content": content, "refusal": None}


def _named(token: str, value: float) -> dict[str, Any]:
    has_text = token and not token.startswith("token_id:")
    return {"token": token, "logprob": value, "bytes": list(token.encode()) if has_text else None}
