"""Connections between the processes that serve one model: process 0 leads, the others follow.

Each follower has a connection to process 0, by TCP, over which it gets what to do (see `replay`),
and tells that it is ready, that it was asked to end, or by what it failed. A connection that closes
tells at once that a process is gone; where a whole machine is, the runtime's heartbeats do.
Both ends prove that they know a key that process 0 makes up and that is exchanged as arrays are.
"""

import contextlib
import dataclasses
import multiprocessing.connection
import pickle
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from glm_jax import processes
from glm_jax.errors import UserError
from glm_jax.processes import ProcessesError
from glm_jax.serving.replay import Orders

_CONNECT_SECONDS = 60.0
_ACCEPT_SECONDS = 0.1
CAUSE_SECONDS = 1.5  # until the end of a process is known to those whom it interrupted
_LAST_SECONDS = 10.0  # for followers to end before process 0, without which they are aborted


class LostProcessError(UserError):
    """A process of those that serve one model together is gone, or failed."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A follower can answer."""


@dataclasses.dataclass(frozen=True)
class AskedToEnd:
    """A follower got SIGTERM or SIGINT."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """A follower is about to end."""

    reason: str


@dataclasses.dataclass(frozen=True)
class End:
    """Followers are to end.

    Attributes:
      failure: of another process; None for an end in order.
      at_once: not after what they were given to do.
    """

    failure: str | None
    at_once: bool


class Followers:
    """Process 0's connections to all others.

    Attributes:
      is_asked: whether one of them was asked to end.
      failure: why the processes must end.
    """

    def __init__(self, connections: Mapping[int, Connection]):
        """
        Args:
          connections: by the index of the process.
        """
        self.failure: LostProcessError | None = None
        self._connections, self._count = dict(connections), len(connections) + 1
        self._waiting_for = set(connections)  # until they are ready
        self._open = {connection: index for index, connection in connections.items()}
        self._changed = threading.Condition()
        self.is_asked = self._is_ending = False
        self._on_change: Callable[[], object] = lambda: None
        threading.Thread(target=self._listen, name="followers", daemon=True).start()

    def watch(self, on_change: Callable[[], object]) -> None:
        """Have a function called, in any thread, when `is_asked` or `failure` is set."""
        self._on_change = on_change
        on_change()  # of what came before

    def _listen(self) -> None:
        while self._open:
            for connection in multiprocessing.connection.wait(list(self._open)):
                assert isinstance(connection, Connection)
                self._receive(connection)
                self._on_change()

    def _receive(self, connection: Connection) -> None:
        index = self._open[connection]
        name = f"process {index} of {self._count}"
        failure = None
        try:
            message = connection.recv()
        except (EOFError, OSError):
            message, failure = None, f"{name} is gone: its own output, if any, says why"
        with self._changed:
            match message:
                case Ready():
                    self._waiting_for.discard(index)
                case AskedToEnd():
                    self.is_asked = True
                case Failed(reason):
                    failure = f"{name} failed: {reason}"
                case None:
                    del self._open[connection]
            if failure is not None and self.failure is None and not self._is_ending:
                self.failure = LostProcessError(failure)
            self._changed.notify_all()

    def wait_ready(self) -> None:
        """Return when all followers are ready.

        Raises:
          LostProcessError: one is gone or has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.failure or not self._waiting_for)
        if self.failure is not None:
            raise self.failure

    def cause(self, error: Exception) -> Exception:
        """Return the error that made another one happen: the end of a process interrupts what the
        others do together with it."""
        if isinstance(error, UserError):
            return error
        with self._changed:
            self._changed.wait_for(lambda: self.failure, CAUSE_SECONDS)
        return self.failure or error

    def send(self, message: Orders | End) -> None:
        """Have all followers do what this process does, or end."""
        encoded = pickle.dumps(message)
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # the thread that listens to it says so
                connection.send_bytes(encoded)

    def end(self, failure: BaseException | None = None, at_once: bool = False) -> None:
        """Have all followers end; the last use of this.

        Args:
          failure: for which they end with status 1; they end in order without.
          at_once: not after what they were given to do.

        Returns:
          When they have ended, or have taken too long.
        """
        with self._changed:
            if self._is_ending:
                return
            self._is_ending = True
        if failure is None:
            self.send(End(None, at_once))
        else:
            self.send(End(self._described(failure), True))
        with self._changed:
            self._changed.wait_for(lambda: not self._open, _LAST_SECONDS)

    def _described(self, failure: BaseException) -> str:
        if isinstance(failure, LostProcessError):
            return str(failure)
        return f"process 0 of {self._count} failed: {described(failure)}"


class Leader:
    """A follower's connection to process 0."""

    def __init__(self, connection: Connection, index: int, count: int):
        self.index, self.count = index, count
        self._connection, self._sending = connection, threading.Lock()

    def receive(self) -> Orders | End:
        """Wait for what process 0 says.

        Raises:
          LostProcessError: it is gone.
        """
        try:
            message: Orders | End = self._connection.recv()
        except (EOFError, OSError) as error:
            raise LostProcessError(
                f"process 0 of {self.count} is gone: its own output, if any, says why"
            ) from error
        return message

    def send(self, message: Ready | AskedToEnd | Failed) -> None:
        """Tell process 0."""
        with self._sending, contextlib.suppress(OSError):  # `receive` says that it is gone
            self._connection.send(message)


def described(failure: BaseException) -> str:
    """Return what another process says of an error."""
    kind = "" if isinstance(failure, UserError) else f"{type(failure).__name__}: "
    return kind + " ".join(str(failure).split())


def connect(
    coordinator: str, index: int, count: int, settings: Mapping[str, Any]
) -> Followers | Leader:
    """Connect process 0 with all others; called by all of them before they do anything together.

    Args:
      coordinator: host:port, the host of process 0.
      settings: plain JSON, which must be the same in all processes.

    Raises:
      ProcessesError: settings differ, or a process cannot reach process 0.
    """
    with contextlib.ExitStack() as stack:
        own: dict[str, Any] = {str(index): dict(settings)}
        if index == 0:
            listening = stack.enter_context(_listening())
            own["key"], own["port"] = secrets.token_hex(32), listening.getsockname()[1]
        agreed = processes.gather(own)
        for other in range(1, count):
            _check_equal(agreed["0"], agreed[str(other)], other)
        key = bytes.fromhex(agreed["key"])
        if index == 0:
            return Followers(_accept_all(listening, key, count))
        host = coordinator.rpartition(":")[0].strip("[]")
        return Leader(_connect_to_first((host, agreed["port"]), key, index, count), index, count)


def _check_equal(first: Mapping[str, Any], other: Mapping[str, Any], index: int) -> None:
    for name in first:
        if first[name] != other.get(name):
            raise ProcessesError(
                f"process {index} has {name}={other.get(name)} and process 0 has "
                f"{name}={first[name]}: start all with the same flags and packages"
            )


def _listening() -> socket.socket:
    """Return a socket that listens on a free port of all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept_all(listening: socket.socket, key: bytes, count: int) -> dict[int, Connection]:
    """Return the connections of all followers, by their index; strangers get none."""
    found: dict[int, Connection] = {}

    def welcome(connection: Connection) -> None:
        with contextlib.suppress(OSError, EOFError, multiprocessing.AuthenticationError):
            multiprocessing.connection.deliver_challenge(connection, key)
            multiprocessing.connection.answer_challenge(connection, key)
            found[connection.recv()] = connection

    deadline = time.monotonic() + _CONNECT_SECONDS
    listening.settimeout(_ACCEPT_SECONDS)
    while len(found) < count - 1:
        if time.monotonic() > deadline:
            missing = ", ".join(str(i) for i in range(1, count) if i not in found)
            raise ProcessesError(
                f"processes {missing} of {count} do not reach process 0 at port "
                f"{listening.getsockname()[1]}, which is free and chosen by the system: open "
                "the ports between the hosts"
            )
        with contextlib.suppress(TimeoutError):
            accepted, _ = listening.accept()
            # In a thread, for who connects may say nothing.
            threading.Thread(target=welcome, args=[_connection(accepted)], daemon=True).start()
    return found


def _connect_to_first(address: tuple[str, int], key: bytes, index: int, count: int) -> Connection:
    try:
        connection = _connection(socket.create_connection(address, _CONNECT_SECONDS))
        multiprocessing.connection.answer_challenge(connection, key)
        multiprocessing.connection.deliver_challenge(connection, key)
        connection.send(index)
    except (OSError, EOFError, multiprocessing.AuthenticationError) as error:
        host, port = address
        raise ProcessesError(
            f"process {index} of {count} does not reach process 0 at {host}:{port}: {error}: open "
            "the ports between the hosts"
        ) from error
    return connection


def _connection(connected: socket.socket) -> Connection:
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(connected.detach())
