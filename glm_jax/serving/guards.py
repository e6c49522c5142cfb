"""What every request passes before it is read: its key, its size; and how long it took."""

import time

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm_jax.serving.errors import error_response, refused
from glm_jax.serving.service import Service

_OPEN = ("/", "/health", "/ready", "/metrics", "/openapi.json")
_BEARER = "Bearer "


class Guard:
    """Refuses requests without a key, or that are too large, and counts all of them."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(scope)
        try:
            if refusal is not None:
                await error_response(refusal)(scope, receive, sending)
            else:
                await self._app(scope, self._limited(receive), sending)
        finally:
            route = scope.get("route")
            endpoint = "other" if route is None else route.path
            metrics = self._service.metrics
            metrics.requests.labels(endpoint, str(status)).inc()
            metrics.request_seconds.labels(endpoint).observe(time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> HTTPException | None:
        headers = dict(scope["headers"])
        path, keys = scope["path"], self._service.keys
        is_open = path in _OPEN or path.startswith("/page/") or scope["method"] == "OPTIONS"
        if keys is not None and not is_open:
            given = headers.get(b"authorization", b"").decode("latin-1")
            if not (given.startswith(_BEARER) and keys.has(given.removeprefix(_BEARER))):
                message = "no valid API key: send one as 'Authorization: Bearer KEY'"
                more = {"WWW-Authenticate": "Bearer"}
                return refused(401, message, code="invalid_api_key", headers=more)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._service.limits.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> HTTPException:
        most = self._service.limits.body_bytes
        return refused(413, f"the request is over {most} bytes: send less")

    def _limited(self, receive: Receive) -> Receive:
        """A body that says no length is counted as it comes."""
        count = 0

        async def receiving() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self._service.limits.body_bytes:
                raise self._too_large()
            return message

        return receiving
