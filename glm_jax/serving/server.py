"""The life of a server: it listens, loads, answers and drains."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import uvicorn
import uvloop

from glm_jax.serving import events
from glm_jax.serving.app import make_app
from glm_jax.serving.connections import Connections, allow_connections
from glm_jax.serving.errors import ServerError
from glm_jax.serving.guards import Hosts, check_proxies
from glm_jax.serving.links import Followers
from glm_jax.serving.metrics import Metrics
from glm_jax.serving.service import Service, Serving
from glm_jax.serving.worker import ServedModel, Worker

_BACKLOG = 2048
_LAST_SECONDS = 2.0  # for responses to the requests that the end of the server cancels
_log = logging.getLogger(__name__)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process with their own status."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """A server of one model.

    Attributes:
      service: the parts that its requests share.
      is_interrupted: whether Ctrl-C ended it.
    """

    def __init__(
        self,
        load: Callable[[], ServedModel],
        serving: Serving,
        followers: Followers | None = None,
    ):
        """
        Args:
          load: loads the model; called in a thread.
          followers: processes that run the model together with this one.
        """
        metrics = Metrics()
        self.is_interrupted = False
        self._was_told = False  # to drain, by whoever looks after this process
        self._followers = followers
        self._failed = asyncio.Event()
        worker = Worker(
            load,
            serving.max_waiting,
            metrics,
            self._failed.set,
            serving.max_waiting_tokens,
            followers,
        )
        self.service = Service(serving, worker, metrics)
        hosts = Hosts.of(serving.host, serving.allowed_hosts)
        check_proxies(serving.trusted_proxies)
        # Twice: headers of chunks may take as much as their contents.
        connections: Any = Connections(serving.connections, 2 * serving.limits.body_bytes)
        config = uvicorn.Config(
            make_app(self.service, hosts, serving.connections.head_bytes, serving.cors_origins),
            http=connections,
            ws="none",
            h11_max_incomplete_event_size=serving.connections.head_bytes,
            # Any other client could write these headers itself.
            proxy_headers=bool(serving.trusted_proxies),
            forwarded_allow_ips=list(serving.trusted_proxies),
            lifespan="off",
            log_config=None,
            access_log=False,
            backlog=_BACKLOG,
            timeout_keep_alive=serving.connections.idle_seconds,  # type: ignore[arg-type]
            timeout_graceful_shutdown=max(1, round(serving.drain_seconds)),
            server_header=False,
        )
        self._uvicorn = _Uvicorn(config)

    @property
    def connections(self) -> Collection[Any]:
        """Open connections."""
        return self._uvicorn.server_state.connections

    def drain(self) -> None:
        """Refuse new requests and end after the running ones; a second call ends at once."""
        if self._was_told:
            self._uvicorn.force_exit = True
            for connection in list(self.connections):
                connection.end()
        self._was_told = True
        self._begin_draining()

    def _begin_draining(self) -> None:
        worker = self.service.worker
        if not worker.is_draining:
            events.log.info("draining: %d requests are running", worker.open_sessions)
        self._uvicorn.should_exit = True
        worker.is_draining = True

    def interrupt(self) -> None:
        """Drain after Ctrl-C."""
        self.is_interrupted = True
        worker = self.service.worker
        if worker.open_sessions and not worker.is_draining:
            count = worker.open_sessions
            print(f"waiting for {count} requests; Ctrl-C again ends at once", flush=True)
        self.drain()

    async def run(self, listening: socket.socket) -> None:
        """Serve until drained.

        Raises:
          Exception: the error by which loading, or the engine, failed.
        """
        worker = self.service.worker
        worker.start()
        if self._followers is not None:
            self._watch(self._followers)
        watching = asyncio.create_task(self._drain_when_failed())
        await self._uvicorn.serve([listening])
        watching.cancel()
        if worker.failure is not None:
            raise worker.failure
        if tasks := list(self._uvicorn.server_state.tasks):  # cancelled, but not done
            await asyncio.wait(tasks, timeout=_LAST_SECONDS)
        await worker.stop(is_waiting=not self._uvicorn.force_exit)
        events.log.info("ended")

    def _watch(self, followers: Followers) -> None:
        """Drain when a follower was asked to end, and end when one is gone."""
        loop, worker = asyncio.get_running_loop(), self.service.worker

        def look() -> None:
            if followers.is_asked:
                self._begin_draining()  # all may be asked at once: this is not a second signal
            if followers.failure is not None:
                worker.fail(followers.failure)

        def on_change() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(look)

        followers.watch(on_change)

    async def _drain_when_failed(self) -> None:
        await self._failed.wait()
        self.drain()


def serve(
    load: Callable[[], ServedModel], serving: Serving, followers: Followers | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then answer the running requests and end. A second signal
    ends the server at once.

    The address answers at once, `/ready` when the model is loaded.

    Args:
      load: loads the model; called in a thread.
      followers: processes that run the model together with this one, and end with it.

    Raises:
      ServerError: the server cannot listen on the address.
      KeyboardInterrupt: SIGINT ended it.
      Exception: the error by which `load`, or the engine, failed.
    """
    wanted = serving.connections.count
    count = allow_connections(wanted)
    if count < wanted:
        _log.warning(
            "--max_connections=%d: only %d fit the limit of open files (ulimit -n)", wanted, count
        )
    connections = dataclasses.replace(serving.connections, count=count)
    serving = dataclasses.replace(serving, connections=connections)
    with bound_socket(serving.host, serving.port) as listening:
        server = uvloop.run(_serve(load, serving, listening, followers))
    is_alive = server.service.worker.is_alive
    if followers is not None:
        followers.end(at_once=is_alive)
    if server.is_interrupted:
        raise KeyboardInterrupt
    if is_alive or followers is not None:
        # A normal exit would abort, as the thread may be compiling, or wait for followers.
        sys.stdout.flush()
        os._exit(0)


async def _serve(
    load: Callable[[], ServedModel],
    serving: Serving,
    listening: socket.socket,
    followers: Followers | None,
) -> Server:
    """Serve, and return the server when it has ended."""
    server = Server(load, serving, followers)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, server.drain)
    loop.add_signal_handler(signal.SIGINT, server.interrupt)
    host, port = listening.getsockname()[:2]
    print(f"serving {serving.name} on http://{host}:{port}", flush=True)
    await server.run(listening)
    return server


def bound_socket(host: str, port: int) -> socket.socket:
    """Return the socket that a server listens on.

    Args:
      port: 0 for any free one.

    Raises:
      ServerError: the server cannot listen on the address.
    """
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # asyncio sets TCP_NODELAY only on sockets that name their protocol.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise ServerError(f"--host={host} --port={port}: {error.strerror}: name another") from error
    return listening
