"""The server's addresses."""

import typing
from collections.abc import Callable, Coroutine, Sequence
from importlib import resources
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from glm_jax.serving import schemas
from glm_jax.serving.bodies import parse
from glm_jax.serving.completions import CompletionRun
from glm_jax.serving.errors import add_handlers, refused
from glm_jax.serving.filling import FillRun
from glm_jax.serving.guards import Guard, Hosts
from glm_jax.serving.responses import answer
from glm_jax.serving.service import Service

_PAGE = resources.files("glm_jax.serving") / "page"
_PAGE_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
# The page takes nothing from elsewhere, and is shown in no other's frame.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_SHORT = 1 << 13  # bytes of a body that are read and made tokens of in a millisecond or two
_METRICS_KIND = "text/plain; version=0.0.4; charset=utf-8"

_Result = TypeVar("_Result")


class _LeanRoute(APIRoute):
    """Reads a body in one step: of a request's time FastAPI's own way takes a millisecond.

    Its endpoints take the request, the body and the service.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint = self.endpoint
        kind = typing.get_type_hints(endpoint)["wanted"]

        async def handle(request: Request) -> Response:
            # Any page that a browser shows can send other kinds, with any parameters behind them.
            sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if sent != "application/json":
                message = "expected JSON: send it with 'Content-Type: application/json'"
                raise refused(400, message)
            wanted = await _compute(request, parse, kind, await request.body())
            response: Response = await endpoint(request, wanted, _service(request))
            return response

        return handle


async def _compute(request: Request, function: Callable[..., _Result], *args: Any) -> _Result:
    """What a function makes of a request; where that may take long, others go on meanwhile."""
    if len(await request.body()) <= _SHORT:
        return function(*args)
    return await _service(request).compute(function, *args)


_bearer = HTTPBearer(auto_error=False, description="A key of the server's.")
asking = APIRouter(responses=schemas.ERRORS, route_class=_LeanRoute)
api = APIRouter(responses=schemas.ERRORS)
open_to_all = APIRouter(responses=schemas.ERRORS)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]


def make_app(
    service: Service, hosts: Hosts, head_bytes: int, cors_origins: Sequence[str] = ()
) -> FastAPI:
    """A server of one model.

    Args:
      hosts: names that requests may be sent to.
      head_bytes: of a request's line and headers at most.
      cors_origins: of pages whose scripts may ask, beside the server's own.
    """
    app = FastAPI(
        title="glm_jax",
        version="1",
        description="Completions and filled blanks of a GLM model.",
        docs_url=None,  # these pages come from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    # `Guard` checks keys; the document says that it does.
    keys = [] if service.keys is None else [Depends(_bearer)]
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
    return {200: {"model": model, "content": content, "description": "Whole, or as events."}}


@asking.post("/v1/completions", responses=_json_or_events(schemas.Completion))
async def completions(
    request: Request, wanted: schemas.CompletionRequest, service: ServiceOf
) -> Response:
    """Goes on from prompts, or fills the one blank of each."""
    run = await _compute(request, CompletionRun, service, wanted)
    return await answer(request, run, bool(wanted.stream))


@asking.post("/v1/fill", responses=_json_or_events(schemas.Filled))
async def fill(request: Request, wanted: schemas.FillRequest, service: ServiceOf) -> Response:
    """Fills the blanks of a text."""
    run = await _compute(request, FillRun, service, wanted)
    return await answer(request, run, bool(wanted.stream))


@asking.post("/tokenize", response_model=schemas.Tokens)
async def tokenize(
    request: Request, wanted: schemas.TokenizeRequest, service: ServiceOf
) -> Response:
    """Tokens of a text, masks among them, as they are: no blank is put at its end."""
    encode = service.worker.ready_model().tokenizer.encode

    def tokenized() -> Response:
        tokens = encode(wanted.text)
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    return await _compute(request, tokenized)


def _described(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "glm_jax",
    }


@api.get("/v1/models", response_model=schemas.Models)
async def models(service: ServiceOf) -> Response:
    """The one model that is here."""
    return JSONResponse({"object": "list", "data": [_described(service)]})


@api.get("/v1/models/{name}", response_model=schemas.Model)
async def model(name: str, service: ServiceOf) -> Response:
    """The model of a name."""
    service.check_model(name)
    return JSONResponse(_described(service))


@open_to_all.get("/health", response_model=schemas.Health)
async def health(service: ServiceOf) -> Response:
    """Whether the server is alive, though it may have no model yet."""
    if service.worker.failure is not None:
        raise refused(503, "the engine failed: the server's log says how")
    return JSONResponse({"status": "ok"})


@open_to_all.get("/ready", response_model=schemas.Health)
async def ready(service: ServiceOf) -> Response:
    """Whether the model answers."""
    service.worker.ready_model()
    return JSONResponse({"status": "ok"})


@open_to_all.get(
    "/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(service: ServiceOf) -> Response:
    """For Prometheus."""
    service.metrics.ready.set(service.worker.is_ready)
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
        raise refused(404, f"there is no {name!r} here")
    kind = _PAGE_KINDS[name.rpartition(".")[2]]
    return Response(found[0].read_bytes(), media_type=kind, headers=_PAGE_HEADERS)
