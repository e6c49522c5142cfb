"""The parts of a server that its requests share."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.sampling import Sampling
from glm_jax.generation.grammars import Grammar
from glm_jax.generation.text_request import TextRequest
from glm_jax.serving.chat_template import ChatTemplate
from glm_jax.serving.connections import DEFAULT_CONNECTIONS, ConnectionLimits
from glm_jax.serving.errors import ServerError, refused
from glm_jax.serving.keys import Keys
from glm_jax.serving.metrics import Metrics
from glm_jax.serving.schemas import OUR_SETTINGS, CompletionRequest, FillRequest
from glm_jax.serving.worker import Worker

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
      seconds: until its answer is complete.
      body_bytes: maximum size of its JSON.
      beams: maximum width of a beam search; 1 for no searches.
    """

    seconds: float = 600.0
    body_bytes: int = 1 << 20
    beams: int = 4


@dataclasses.dataclass(frozen=True)
class Serving:
    """Settings of a server.

    Attributes:
      name: the model's name for clients.
      adapters: names of its adapters, which clients may ask for instead; their ids count from 1.
      port: 0 for any free one.
      max_waiting: answers that may wait for a slot.
      max_waiting_tokens: see `Worker`.
      cors_origins: origins of other pages whose scripts may send requests.
      allowed_hosts: names that requests may be sent to, beside those of `host`.
      trusted_proxies: addresses or networks of proxies, whose X-Forwarded-For names the client.
      logs_requests: whether each request is an event of the log.
      chat_template: makes a prompt of a chat's messages; None for no chat.
      drain_seconds: time that running requests have to end when the server goes down.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    max_waiting: int = 256
    max_waiting_tokens: int | None = None
    limits: Limits = Limits()
    keys: Keys | None = None
    cors_origins: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    trusted_proxies: Sequence[str] = ()
    connections: ConnectionLimits = DEFAULT_CONNECTIONS
    drain_seconds: float = 600.0
    logs_requests: bool = False
    chat_template: ChatTemplate | None = None
    adapters: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.name in self.adapters:
            raise ServerError(f"an adapter has the model's own name, {self.name}: give it another")


@dataclasses.dataclass(frozen=True)
class Service:
    """The parts of a server.

    Attributes:
      created: start time, in seconds since the epoch.
    """

    settings: Serving
    worker: Worker
    metrics: Metrics
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    # Two threads: a long body does not wait for one other.
    _threads: Executor = dataclasses.field(
        default_factory=lambda: ThreadPoolExecutor(2, "request"), repr=False
    )

    async def compute(self, function: Callable[..., _Result], *args: Any) -> _Result:
        """Call a function in a thread, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that clients may ask for, by `Prompt.adapter`: the model's, then its adapters'."""
        return self.settings.name, *self.settings.adapters

    def adapter_of(self, name: str | None) -> int:
        """Return the `Prompt.adapter` of a name that a client asks for; None is the model's.

        Raises:
          HTTPException: the name of another model.
        """
        if name is None:
            return 0
        if name not in self.names:
            known = " or ".join(map(repr, self.names))
            message = f"the model {name!r} is not here: ask for {known}"
            raise refused(404, message, "model", "model_not_found")
        return self.names.index(name)

    def choice(
        self,
        request: CompletionRequest | FillRequest,
        beams: int | None,
        name_of_beams: str = "num_beams",
    ) -> Sampling | BeamSearch:
        """Return how a request's tokens are chosen.

        Args:
          beams: width of a beam search; None or 1 for sampling.
          name_of_beams: the field that gives it.

        Raises:
          HTTPException: settings that exclude each other.
          UserError: a setting out of range.
        """
        beams = beams or 1
        if beams > (limit := self.settings.limits.beams):
            message = f"{name_of_beams}={beams}: this server takes at most {limit}"
            raise refused(400, message, name_of_beams)
        settings = self._settings(request)
        if beams == 1:
            settings |= _sampling(request)
        else:
            for name in ("temperature", "top_p", "seed"):
                if name in request.model_fields_set and getattr(request, name) not in (None, 0, 1):
                    message = f"{name} beside num_beams={beams}: a search takes no such setting"
                    raise refused(400, message, name)
            settings["num_beams"] = beams
        encode = self.worker.ready_model().tokenizer.encode
        return TextRequest().with_fields(settings).choice(encode)

    def guide(self, request: CompletionRequest | FillRequest, answers: int) -> Grammar | None:
        """Return what a request's answers must be, prepared for so many; None for anything.

        Raises:
          UserError: it cannot be understood or followed, or is said twice.
        """
        settings = TextRequest().with_fields(self._settings(request))
        guide = settings.guide(self.worker.ready_model().tokenizer)
        if guide is not None:
            guide.prepare(answers)
        return guide

    def _settings(self, request: CompletionRequest | FillRequest) -> dict[str, Any]:
        """Return the settings of a request that the table has."""
        settings = {name: getattr(request, name) for name in OUR_SETTINGS}
        if request.response_format is not None:
            schema = request.response_format.guided_json
            if schema is not None and settings["guided_json"] is not None:
                raise refused(400, "guided_json beside response_format: give one", "guided_json")
            settings["guided_json"] = settings["guided_json"] if schema is None else schema
        return {name: value for name, value in settings.items() if value is not None}


def _sampling(request: CompletionRequest | FillRequest) -> dict[str, Any]:
    """Return temperature and top_p as the engine takes them: its top_p of 0 keeps all tokens."""
    temperature, top_p = request.temperature, request.top_p
    if temperature is None:
        temperature = type(request).model_fields["temperature"].default
    if top_p == 0:  # the argmax
        return {"temperature": 0.0}
    return {"temperature": float(temperature), "top_p": 0.0 if top_p in (None, 1) else top_p}


def seed_of(seed: int | None, number: int = 0) -> int:
    """Return the engine's seed for the `number`-th answer of a request; random without a seed."""
    return (secrets.randbits(32) if seed is None else seed + number) % 2**32


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
