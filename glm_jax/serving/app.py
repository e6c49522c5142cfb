"""The server's endpoints."""

import typing
from collections.abc import Callable, Coroutine, Sequence
from importlib import resources
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from glm_jax.serving import answer_schemas, schemas
from glm_jax.serving.bodies import parse
from glm_jax.serving.chat import ChatRun
from glm_jax.serving.completions import CompletionRun
from glm_jax.serving.embeddings import EmbeddingRun
from glm_jax.serving.errors import add_handlers, refused
from glm_jax.serving.filling import FillRun
from glm_jax.serving.guards import Guard, Hosts
from glm_jax.serving.responses import answer
from glm_jax.serving.run import Run
from glm_jax.serving.scoring import ScoreRun
from glm_jax.serving.service import Service

_PAGE = resources.files("glm_jax.serving") / "page"
_PAGE_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
# The page loads nothing from other sites, and no other page may show it in a frame.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_SHORT = 1 << 13  # bytes of a body; parsing and tokenising as much takes a millisecond or two
_METRICS_KIND = "text/plain; version=0.0.4; charset=utf-8"

_Result = TypeVar("_Result")


class _LeanRoute(APIRoute):
    """A route that reads a body in one step; FastAPI's own way takes a millisecond of a request.

    Its endpoints take the HTTP request, the parsed body (`wanted`) and the service.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint = self.endpoint
        kind = typing.get_type_hints(endpoint)["wanted"]

        async def handle(request: Request) -> Response:
            # Browsers let any page send the other types, whatever parameters follow them.
            sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if sent != "application/json":
                message = "expected JSON: send it with 'Content-Type: application/json'"
                raise refused(400, message)
            wanted = await _compute(request, parse, kind, await request.body())
            response: Response = await endpoint(request, wanted, _service(request))
            return response

        return handle


async def _compute(request: Request, function: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function, in another thread if the body is so long that others would wait."""
    if len(await request.body()) <= _SHORT:
        return function(*args)
    return await _service(request).compute(function, *args)


async def _answered(
    request: Request, kind: Callable[[Service, Any], Run], wanted: Any, service: Service
) -> Response:
    """Answer what a request wants by a run, as events if it asks for them."""
    run = await _compute(request, kind, service, wanted)
    return await answer(request, run, is_stream=bool(getattr(wanted, "stream", False)))


_bearer = HTTPBearer(auto_error=False, description="One of the server's API keys.")
asking = APIRouter(responses=answer_schemas.ERRORS, route_class=_LeanRoute)
api = APIRouter(responses=answer_schemas.ERRORS)
open_to_all = APIRouter(responses=answer_schemas.ERRORS)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]


def make_app(
    service: Service, hosts: Hosts, head_bytes: int, cors_origins: Sequence[str] = ()
) -> FastAPI:
    """Build the app that serves one model.

    Args:
      hosts: names that requests may be sent to.
      head_bytes: maximum size of a request's line and headers.
      cors_origins: origins of other pages whose scripts may send requests.
    """
    app = FastAPI(
        title="glm_jax",
        version="1",
        description="Completions and filled blanks of a GLM model.",
        docs_url=None,  # these pages come from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    # `Guard` checks keys; this tells the OpenAPI document so.
    keys = [] if service.settings.keys is None else [Depends(_bearer)]
    for router in (asking, api):
        app.include_router(router, dependencies=keys)
    app.include_router(open_to_all)
    add_handlers(app)
    app.add_middleware(
        Guard, service=service, hosts=hosts, head_bytes=head_bytes, origins=cors_origins
    )
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _json_or_events(model: Any) -> dict[int | str, dict[str, Any]]:
    events = {"schema": {"type": "string"}}
    content = {"text/event-stream": events}
    return {200: {"model": model, "content": content, "description": "One JSON object, or events."}}


@asking.post("/v1/completions", responses=_json_or_events(answer_schemas.Completion))
async def completions(
    request: Request, wanted: schemas.CompletionRequest, service: ServiceOf
) -> Response:
    """Complete prompts, or fill the one blank of each."""
    return await _answered(request, CompletionRun, wanted, service)


@asking.post("/v1/chat/completions", responses=_json_or_events(answer_schemas.ChatCompletion))
async def chat_completions(
    request: Request, wanted: schemas.ChatRequest, service: ServiceOf
) -> Response:
    """Answer messages, by the server's chat template."""
    return await _answered(request, ChatRun, wanted, service)


@asking.post("/v1/embeddings", response_model=answer_schemas.Embeddings)
async def embeddings(
    request: Request, wanted: schemas.EmbeddingRequest, service: ServiceOf
) -> Response:
    """Return the mean final hidden states of texts."""
    return await _answered(request, EmbeddingRun, wanted, service)


@asking.post("/v1/fill", responses=_json_or_events(answer_schemas.Filled))
async def fill(request: Request, wanted: schemas.FillRequest, service: ServiceOf) -> Response:
    """Fill the blanks of a text."""
    return await _answered(request, FillRun, wanted, service)


@asking.post("/v1/score", response_model=answer_schemas.Scored)
async def score(request: Request, wanted: schemas.ScoreRequest, service: ServiceOf) -> Response:
    """Score choices for the one blank of a text."""
    return await _answered(request, ScoreRun, wanted, service)


@asking.post("/tokenize", response_model=answer_schemas.Tokens)
async def tokenize(
    request: Request, wanted: schemas.TokenizeRequest, service: ServiceOf
) -> Response:
    """Return the tokens of a text, including masks; no blank is added at its end."""
    service.adapter_of(wanted.model)
    encode = service.worker.ready_model().tokenizer.encode
    texts = [text for text in (wanted.text, wanted.prompt) if text is not None]
    if len(texts) != 1:
        raise refused(400, "expected one text, as 'text' or as 'prompt'", "text")

    def tokenized() -> Response:
        tokens = encode(texts[0])
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    return await _compute(request, tokenized)


@asking.post("/detokenize", response_model=answer_schemas.Detokenized)
async def detokenize(
    request: Request, wanted: schemas.DetokenizeRequest, service: ServiceOf
) -> Response:
    """Return the text of tokens."""
    service.adapter_of(wanted.model)
    decode = service.worker.ready_model().tokenizer.decode
    return await _compute(request, lambda: JSONResponse({"prompt": decode(wanted.tokens)}))


@api.get("/tokenizer_info", response_model=answer_schemas.TokenizerInfo)
async def tokenizer_info(service: ServiceOf) -> Response:
    """Return what clients of vLLM's interface need to tokenise by this server."""
    tokenizer = service.worker.ready_model().tokenizer
    eop = tokenizer.decode([tokenizer.special_tokens.eop])
    return JSONResponse({"tokenizer_class": type(tokenizer).__name__, "eos_token": eop})


def _described(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "glm_jax",
        "parent": None if name == service.settings.name else service.settings.name,
    }


@api.get("/v1/models", response_model=answer_schemas.Models)
async def models(service: ServiceOf) -> Response:
    """List the server's model, then the same with each of its adapters."""
    data = [_described(service, name) for name in service.names]
    return JSONResponse({"object": "list", "data": data})


@api.get("/v1/models/{name}", response_model=answer_schemas.Model)
async def model(name: str, service: ServiceOf) -> Response:
    """Return the model of a name."""
    service.adapter_of(name)
    return JSONResponse(_described(service, name))


@open_to_all.get("/health", response_model=answer_schemas.Health)
async def health(service: ServiceOf) -> Response:
    """Return 200 while the server is alive, though the model may not be loaded yet."""
    if service.worker.failure is not None:
        raise refused(503, "the engine failed: the server's log says how")
    return JSONResponse({"status": "ok"})


@open_to_all.get("/ready", response_model=answer_schemas.Health)
async def ready(service: ServiceOf) -> Response:
    """Return 200 while the model answers requests."""
    service.worker.ready_model()
    return JSONResponse({"status": "ok"})


@open_to_all.get(
    "/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(service: ServiceOf) -> Response:
    """Return metrics for Prometheus."""
    service.metrics.ready.set(service.worker.is_ready)
    service.metrics.waiting_tokens.set(service.worker.waiting_tokens)
    return Response(service.metrics.text(), headers={"Content-Type": _METRICS_KIND})


@open_to_all.get("/", include_in_schema=False)
async def page() -> Response:
    return _page_file("index.html")


@open_to_all.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> Response:
    return _page_file(name)


def _page_file(name: str) -> Response:
    found = [file for file in _PAGE.iterdir() if file.name == name]
    if not found:
        raise refused(404, f"no such page: {name!r}")
    kind = _PAGE_KINDS[name.rpartition(".")[2]]
    return Response(found[0].read_bytes(), media_type=kind, headers=_PAGE_HEADERS)
