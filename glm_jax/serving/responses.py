"""HTTP responses of runs, whole or as events, cancelled when their client goes away."""

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Hashable
from typing import Any

import anyio
from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from glm_jax.errors import UserError
from glm_jax.serving.errors import BrokenError, described
from glm_jax.serving.run import Run
from glm_jax.serving.service import Service

_GRACE = 30.0  # seconds a client has for reading, beyond those for its answer


async def answer(request: Request, run: Run, is_stream: bool) -> Response:
    """Start a run and return its response, as events or whole. The run is closed in any case.

    Raises:
      UserError: the queue is full, or the engine refuses the request.
    """
    run.start(_client(request, run.service))
    if is_stream:
        return EventStream(_events(run), run.close, run.service.settings.limits.seconds + _GRACE)
    try:
        whole = await _while_waited_for(request, run.response())
    finally:
        run.close()
    # 499: the client has gone, and only the metrics see the status.
    return Response(status_code=499) if whole is None else whole


def _client(request: Request, service: Service) -> Hashable:
    """Return what identifies the client: a digest of its key, or its address where no keys are
    required."""
    if service.settings.keys is not None:
        key = request.headers.get("authorization", "").partition(" ")[2].strip()
        return hashlib.sha256(key.encode()).digest()
    return None if request.client is None else request.client.host


async def _while_waited_for(request: Request, work: Any) -> Response | None:
    """Return the result of `work`, or None if the client goes away first."""
    working, going = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, going):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(run: Run) -> AsyncIterator[str]:
    """Yield server-sent events; an error becomes the last event."""
    try:
        async for chunk in run.chunks():
            yield _event(chunk)
    except (UserError, BrokenError) as error:
        status, content, _ = described(error)
        if status == 500:
            logging.getLogger(__name__).error("a stream broke off", exc_info=error)
        yield _event(content)
        return
    yield "data: [DONE]\n\n"


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """A stream of events that ends, and closes its run, when the client goes away."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None], seconds: float):
        # Proxies must not buffer events.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._close, self._seconds = close, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(self._seconds):  # for a client that reads nothing
                async with anyio.create_task_group() as group:

                    async def send_all() -> None:
                        await self.stream_response(send)
                        group.cancel_scope.cancel()

                    group.start_soon(send_all)
                    await self.listen_for_disconnect(receive)
                    group.cancel_scope.cancel()
        finally:
            self._close()
