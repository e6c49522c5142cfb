"""Commands to the driver of a served model, which every process that runs the model carries out.

Where several processes run one model together, each has a driver of its own, and all must launch
the same programs in the same order. So whatever depends on clients, time or threads is a command:
process 0 decides on it, between which turns, and the others repeat it (see `links`). What a driver
does by itself depends on its commands alone.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import io
import itertools
import pickle
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, runtime_checkable

from glm_jax.engine.engine import Engine
from glm_jax.engine.fair_queue import Turn
from glm_jax.engine.request import Token
from glm_jax.errors import UserError
from glm_jax.generation.driver import Answer, Driver
from glm_jax.serving import events

News = Sequence[tuple[Answer, Token | None]]


@dataclasses.dataclass(frozen=True)
class Begin:
    """Queue an answer.

    Attributes:
      number: of the answer, its own.
    """

    number: int
    answer: Answer
    turn: Turn


@dataclasses.dataclass(frozen=True)
class Cancel:
    """End the answer of a number, if it is there."""

    number: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Go on with the search whose program, the one of a number, has been compiled."""

    number: int


Command = Begin | Cancel | Compiled


@dataclasses.dataclass(frozen=True)
class Orders:
    """What process 0 did, for the others to repeat.

    Attributes:
      commands: encoded, in order.
      takes_turn: whether a turn follows them.
      checksum: of all news before that turn.
    """

    commands: tuple[bytes, ...]
    takes_turn: bool
    checksum: int


@runtime_checkable
class Runnable(Protocol):
    """A model that can be served: its parts are its attributes."""

    @property
    def engine(self) -> Engine: ...


_Model = TypeVar("_Model", bound=Runnable)


def load_ready(load: Callable[[], _Model], wait: Callable[[], object] = lambda: None) -> _Model:
    """Return a model that is loaded and compiled.

    Args:
      wait: called when it is, before the log says so.
    """
    events.log.info("loading the model")
    began = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    events.log.info("loaded in %.0f s; compiling", loaded - began)
    model.engine.warm_up()
    gc.collect()
    gc.freeze()  # objects that live forever need no further collection passes
    wait()
    events.log.info("ready: compiled in %.0f s", time.perf_counter() - loaded)
    return model


class CommandedDriver:
    """A driver, and the answers that commands name by number. For one thread.

    Attributes:
      driver: to look at, not to change.
      checksum: of all news so far, 0 where the process runs the model alone.
    """

    def __init__(
        self,
        engine: Engine,
        is_alone: bool = True,
        on_compiled: Callable[[Compiled], object] = lambda compiled: None,
    ):
        """
        Args:
          is_alone: whether no other process runs the model too.
          on_compiled: called in any thread with the command that is to follow a compilation.
        """
        self.driver: Driver[Answer] = Driver(engine, self._compile_ahead)
        self.checksum = 0
        self._is_alone, self._on_compiled = is_alone, on_compiled
        self._answers: weakref.WeakValueDictionary[int, Answer] = weakref.WeakValueDictionary()
        self._compiler = ThreadPoolExecutor(1, "compiler")
        self._numbers = itertools.count()
        # By number: what compiles, and what the driver looks at.
        self._compiling: dict[int, tuple[Future[object], Future[object]]] = {}

    def do(self, command: Command) -> News:
        """Carry out a command.

        Returns:
          None with an answer that has ended by it.

        Raises:
          Exception: see `turn`.
        """
        match command:
            case Begin(number, answer, turn):
                self._answers[number] = answer
                if not self.driver.submit(answer, turn):
                    return self._checked([(answer, None)])
            case Cancel(number):
                if (cancelled := self._answers.get(number)) is not None:
                    self.driver.cancel(cancelled)
            case Compiled(number):
                compiling, is_compiled = self._compiling.pop(number)
                concurrent.futures.wait([compiling])
                is_compiled.set_result(None)
        return []

    def turn(self) -> News:
        """Take a turn; see `Driver.turn`.

        Raises:
          Exception: where the process is not alone, one by which an answer ended that is no
            UserError. It may have ended here alone, and then the processes are no longer alike.
        """
        return self._checked(self.driver.turn())

    def repeat(self, orders: Orders, model: object) -> None:
        """Do what another process did.

        Raises:
          DifferenceError: it got other tokens than this process.
          Exception: see `turn`.
        """
        for command in orders.commands:
            self.do(decode(command, model))
        if orders.checksum != self.checksum:
            raise DifferenceError("its tokens are not those of process 0")
        if orders.takes_turn:
            self.turn()

    def _checked(self, news: News) -> News:
        if self._is_alone:
            return news
        for answer, token in news:
            if token is None and not isinstance(answer.error, UserError | None):
                raise answer.error
        if news:
            seen = [token and (token.request_id, token.token) for _, token in news]
            self.checksum = zlib.crc32(repr(seen).encode(), self.checksum)
        return news

    def _compile_ahead(self, program: Callable[[], object]) -> Future[object]:
        number, is_compiled = next(self._numbers), Future[object]()
        compiling = self._compiler.submit(program)
        self._compiling[number] = compiling, is_compiled
        compiling.add_done_callback(lambda _: self._on_compiled(Compiled(number)))
        return is_compiled


class DifferenceError(Exception):
    """Processes that run one model together and do not do the same."""


def encode(command: Command, model: object) -> bytes:
    """Return a command for other processes; parts of the model are named, not copied.

    Args:
      model: whose attributes are its parts.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, model).dump(command)
    return buffer.getvalue()


def decode(encoded: bytes, model: object) -> Command:
    """Return what `encode` was given, with the parts of this process's model."""
    command: Command = _Unpickler(io.BytesIO(encoded), model).load()
    return command


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, model: object):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._names = {id(part): name for name, part in vars(model).items()}

    # `persistent_id` would be asked about every token of a prompt.
    def reducer_override(self, thing: Any) -> Any:
        name = self._names.get(id(thing))
        return NotImplemented if name is None else (_part, (name,))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, model: object):
        super().__init__(file)
        self._model = model

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (__name__, _part.__name__):
            return functools.partial(getattr, self._model)
        return super().find_class(module, name)


def _part(name: str) -> Any:
    """Stand for the part of that name of the model of whoever decodes."""
    raise NotImplementedError
