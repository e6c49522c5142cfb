"""Errors as responses in the form of OpenAI's interface."""

import logging
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from glm_jax.engine.sampling import LogitsError
from glm_jax.engine.scoring import ScoringError
from glm_jax.errors import UserError

_RETRY_SECONDS = 1
_MAX_SHOWN = 200  # characters of what a client sent that an error repeats


class ServerError(UserError):
    """An address that a server cannot listen on."""


class BusyError(UserError):
    """The queue has no room for a request."""


class TooLargeError(UserError):
    """A request that the queue never has room for."""


class UnavailableError(UserError):
    """The model is not ready, or the server is going down."""


class TooSlowError(UserError):
    """A request took longer than the server allows."""


class BrokenError(Exception):
    """The engine or a search failed by an error that no request caused."""


def body(message: str, kind: str, param: str | None = None, code: str | None = None) -> Any:
    """Return the JSON of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def described(error: Exception) -> tuple[int, Any, dict[str, str]]:
    """Return the HTTP status, JSON and headers of an error."""
    message = " ".join(str(error).split())
    match error:
        case BusyError():
            headers = {"Retry-After": str(_RETRY_SECONDS)}
            return 429, body(message, "rate_limit_error", code="queue_full"), headers
        case UnavailableError():
            headers = {"Retry-After": str(10 * _RETRY_SECONDS)}
            return 503, body(message, "server_error", code="unavailable"), headers
        case TooSlowError():
            return 504, body(message, "server_error", code="timeout"), {}
        case LogitsError() | ScoringError():
            return 500, body(message, "server_error"), {}
        case UserError():
            return 400, body(message, "invalid_request_error"), {}
        case StarletteHTTPException():
            kind = "invalid_request_error" if error.status_code < 500 else "server_error"
            detail: dict[str, Any] = error.detail if isinstance(error.detail, dict) else {}
            message = detail.get("message", str(error.detail))
            content = body(message, kind, detail.get("param"), detail.get("code"))
            return error.status_code, content, dict(error.headers or {})
    return 500, body("the server failed; its log says how", "server_error"), {}


def refused(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> HTTPException:
    """Return the exception to raise for a request that is refused."""
    return HTTPException(status, {"message": message, "param": param, "code": code}, headers)


def error_response(error: Exception) -> JSONResponse:
    """Return the response to a request that an error ended."""
    status, content, headers = described(error)
    return JSONResponse(content, status, headers)


def add_handlers(app: FastAPI) -> None:
    """Have an app answer all errors in this form."""
    for kind in (UserError, BrokenError, StarletteHTTPException):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientDisconnect, _answer_no_one)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    status, content, headers = described(error)
    if status in (404, 405) and content["error"]["code"] is None:
        content["error"]["message"] += f": {request.method} {_shown(request.scope['path'])}"
    if status == 500:
        path = _shown(request.scope["path"])
        logging.getLogger(__name__).error("%s %s", request.method, path, exc_info=error)
    return JSONResponse(content, status, headers)


async def _answer_no_one(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


def _shown(path: str) -> str:
    """Return a client's path as one short line."""
    return path[:_MAX_SHOWN] if path.isprintable() else ascii(path[:_MAX_SHOWN])
