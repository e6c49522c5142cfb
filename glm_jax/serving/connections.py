"""Limits of connections: how many are open, and how long each may wait for its client.

uvicorn speaks HTTP by h11, which reads a body as its own length says, whatever other headers ask
for. Connections here are uvicorn's with a deadline for each thing that a client must do.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import resource
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from glm_jax.serving.errors import body

_OTHER_FILES = 256  # file descriptors beside those of connections: model files, caches, logs
_LOG_SECONDS = 10.0  # between two warnings of too many connections

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ConnectionLimits:
    """Limits of a server's connections.

    Attributes:
      count: maximum number that are open at once.
      head_seconds: time from a request's first byte, or from the beginning of the connection, to
        the end of its headers.
      body_seconds: time from there to the end of its body.
      idle_seconds: time between an answer and the next request.
      stall_seconds: time in which a client must read what it is sent, some 50 kB at once.
      head_bytes: maximum size of request line and headers.
    """

    count: int = 1000
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    stall_seconds: float = 10.0
    head_bytes: int = 1 << 14


DEFAULT_CONNECTIONS = ConnectionLimits()


class Connections:
    """The open connections of a server; uvicorn calls this to make each."""

    def __init__(self, limits: ConnectionLimits, body_bytes: int):
        """
        Args:
          body_bytes: maximum size of a body as it is sent, with the headers of its chunks.
        """
        self.limits, self.body_bytes = limits, body_bytes
        # In the order of their clients' last whole message, the oldest first.
        self._open: dict[Connection, None] = {}
        self._crowded = 0
        self._logged = -_LOG_SECONDS

    def __call__(self, **of_uvicorn: Any) -> "Connection":
        return Connection(self, **of_uvicorn)

    def add(self, connection: "Connection") -> None:
        """Add a connection. If there are too many, close the one that has waited longest for its
        client, or refuse the new one if all others are being answered."""
        self._open[connection] = None
        if len(self._open) <= self.limits.count:
            return
        self._warn()
        waited_for = next(c for c in self._open if c.is_waited_for and not c.is_closing)
        if waited_for is connection:
            connection.refuse(503, "too many connections: ask again later")
        else:
            waited_for.end()

    def _warn(self) -> None:
        self._crowded += 1
        now = time.monotonic()
        if now - self._logged < _LOG_SECONDS:
            return
        self._logged = now
        _log.warning(
            "more than %d connections, %d times so far: closing those that are idle, the oldest "
            "first; --max_connections allows more",
            self.limits.count,
            self._crowded,
        )

    def touch(self, connection: "Connection") -> None:
        """Move a connection to the end of the order: its client's message is complete."""
        if connection in self._open:
            del self._open[connection]
            self._open[connection] = None

    def discard(self, connection: "Connection") -> None:
        self._open.pop(connection, None)


class Connection(H11Protocol):
    """A connection with deadlines for its client."""

    def __init__(self, connections: Connections, **of_uvicorn: Any):
        super().__init__(**of_uvicorn)
        self._connections, self._limits = connections, connections.limits
        self._is_new = True
        self._body_bytes = 0
        # What the client must do now and for which request, and the timer of its deadline.
        self._awaited: tuple[str, Any] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    @property
    def is_waited_for(self) -> bool:
        """Whether it is the client's turn: no request is being answered."""
        is_answered = self.cycle is None or self.cycle.response_complete
        return is_answered or self.conn.their_state is h11.SEND_BODY

    @property
    def is_closing(self) -> bool:
        return self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connections.add(self)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        for timer in (self._deadline, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._is_new = False
        if self.conn.their_state is h11.SEND_BODY:
            self._body_bytes += len(data)
            if self._body_bytes > self._connections.body_bytes:
                self.refuse(413, f"the body is over {self._connections.body_bytes} bytes, as sent")
                return
        else:
            self._body_bytes = 0
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._connections.touch(self)
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        self.end()

    def shutdown(self) -> None:
        """End the connection after its answer; a request that is not complete is refused."""
        if not self.is_waited_for:
            super().shutdown()
        elif self.cycle is None or self.cycle.response_complete:
            self.end()
        else:
            self.refuse(503, "the server is going down: ask another one")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self._limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def end(self) -> None:
        """Close the connection without a response."""
        self._disconnect()
        self.transport.close()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        if len(self.conn.trailing_data[0]) > self._limits.head_bytes:
            self.refuse(431, f"the headers are over {self._limits.head_bytes} bytes: send fewer")
        else:
            self.refuse(400, "no valid HTTP request")

    def refuse(self, status: int, message: str) -> None:
        """Respond in place of the app, if it has not begun to, and close the connection."""
        self._disconnect()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            kind = "invalid_request_error" if status < 500 else "server_error"
            is_head = self.cycle is not None and self.cycle.scope["method"] == "HEAD"
            content = b"" if is_head else json.dumps(body(message, kind)).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(content))),
                ("Connection", "close"),
            ]
            phrase = STATUS_PHRASES[status]
            response = h11.Response(status_code=status, headers=headers, reason=phrase)
            for event in (response, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.end()

    def _disconnect(self) -> None:
        """Tell the app that the client has gone."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _watch(self) -> None:
        """Set the deadline of what the client must do now, unless it is set already."""
        awaited, seconds = self._waiting()
        if awaited == self._awaited:
            return
        self._awaited = awaited
        if self._deadline is not None:
            self._deadline.cancel()
        if awaited is not None:
            self._deadline = self.loop.call_later(seconds, self._expire)

    def _waiting(self) -> tuple[tuple[str, Any] | None, float]:
        """Return what the client must do, for which request, and in how many seconds."""
        if self.is_closing:
            return ("close", None), self._limits.stall_seconds
        if self.conn.their_state is h11.SEND_BODY:
            return ("body", self.cycle), self._limits.body_seconds
        is_begun = self._is_new or bool(self.conn.trailing_data[0])
        if self.conn.their_state is h11.IDLE and is_begun:
            return ("head", self.cycle), self._limits.head_seconds
        return None, 0.0  # uvicorn has a timer of its own for idle connections

    def _expire(self) -> None:
        assert self._awaited is not None
        what = self._awaited[0]
        if what == "close":
            self.transport.abort()
        elif self._is_new:
            self.end()
        else:
            seconds = getattr(self._limits, f"{what}_seconds")
            self.refuse(408, f"no whole {what} of a request within {seconds:g} seconds")


def allow_connections(count: int) -> int:
    """Raise the process's limit of open files as far as `count` connections need.

    Returns:
      `count`, or fewer if the system allows no more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        count = max(1, min(count, count - (wanted - soft)))
    return count
