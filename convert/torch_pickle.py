"""Reads the pickle of a PyTorch file without running anything that it names.

A pickle is a program for a machine with a stack. The standard library's machine calls what
the program names; this one knows tensors and plain containers, holds anything else that
training code is known to leave beside them as `Foreign`, and refuses the rest.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

from convert.errors import ConvertError

# Packages whose objects stand beside the weights in checkpoints of training runs.
_KNOWN_BESIDE = (
    "SwissArmyTransformer", "apex", "argparse", "collections", "datetime", "deepspeed",
    "megatron", "model", "numpy", "pathlib", "sat", "torch",
)  # fmt: skip
_MARK = object()


@dataclasses.dataclass(frozen=True)
class Global:
    """A name of a module, as a pickle gives it; never imported."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Foreign:
    """An object that was not built: an instance or a result of what `name` says."""

    name: str


def load(
    data: bytes,
    where: str,
    rebuild: Callable[..., Any],
    open_storage: Callable[[Any], Any],
    most_steps: int,
) -> Any:
    """The object that a pickle describes.

    Args:
      where: what messages call the file.
      rebuild: builds a tensor from the arguments of PyTorch's `_rebuild_tensor_v2`.
      open_storage: gives the storage of a persistent id.
      most_steps: of the program, above which it is refused.

    Raises:
      ConvertError: the pickle is broken, asks for what no checkpoint needs, or is too long.
    """
    machine = _Machine(where, rebuild, open_storage)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= most_steps:
                raise ConvertError(f"{where}: its pickle has more than {most_steps} steps")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except ConvertError:
        raise
    except Exception as error:  # a broken program can go wrong anywhere
        raise ConvertError(f"{where}: its pickle cannot be read ({error})") from error
    raise ConvertError(f"{where}: its pickle has no end")


class _Machine:
    def __init__(self, where: str, rebuild: Any, open_storage: Any):
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._where, self._rebuild, self._open_storage = where, rebuild, open_storage

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        else:
            try:
                act = getattr(self, "_" + name.lower())
            except AttributeError:
                raise ConvertError(
                    f"{self._where}: its pickle uses {name}, which PyTorch does not write"
                ) from None
            act(argument)

    def _to_mark(self) -> list[Any]:
        stack = self.stack
        place = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK)
        items = stack[place + 1 :]
        del stack[place:]
        return items

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._to_mark()))

    def _list(self, _: Any) -> None:
        self.stack.append(self._to_mark())

    def _dict(self, _: Any) -> None:
        items = self._to_mark()
        self.stack.append({})
        self._set(self.stack[-1], items)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def _setitems(self, _: Any) -> None:
        items = self._to_mark()
        self._set(self.stack[-1], items)

    def _set(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                # To hash nested tuples can take longer than anyone lives.
                if not isinstance(key, str | int | float | bytes | None):
                    raise ConvertError(f"{self._where}: its pickle has a {type(key).__name__} key")
                target[key] = value
        elif not isinstance(target, Foreign):
            raise ConvertError(f"{self._where}: its pickle sets items of a {type(target).__name__}")

    def _append(self, _: Any) -> None:
        item = self.stack.pop()
        self._extend(self.stack[-1], [item])

    def _appends(self, _: Any) -> None:
        items = self._to_mark()
        self._extend(self.stack[-1], items)

    def _additems(self, _: Any) -> None:
        items = self._to_mark()
        self._extend(self.stack[-1], items)

    def _extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Foreign):
            raise ConvertError(f"{self._where}: its pickle appends to a {type(target).__name__}")

    def _global(self, argument: str) -> None:
        self.stack.append(self._named(*argument.split(" ", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ConvertError(f"{self._where}: its pickle names something by no name")
        self.stack.append(self._named(module, name))

    def _named(self, module: str, name: str) -> Global:
        if module.split(".")[0] not in _KNOWN_BESIDE:
            raise ConvertError(
                f"{self._where}: its pickle asks for {module}.{name}, which no checkpoint needs; "
                "the file is refused and nothing of it was run"
            )
        return Global(module, name)

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._called(function, arguments))

    _newobj = _reduce

    def _build(self, _: Any) -> None:
        self.stack.pop()  # attributes of an object that is not built, or that needs none

    def _binpersid(self, _: Any) -> None:
        self.stack.append(self._open_storage(self.stack.pop()))

    def _called(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global):
            raise ConvertError(f"{self._where}: its pickle calls a {type(function).__name__}")
        if function == Global("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild(*arguments)
        if function == Global("torch._utils", "_rebuild_parameter"):
            return arguments[0]
        if function == Global("collections", "OrderedDict"):
            made: dict[Any, Any] = {}
            for pairs in arguments:
                for key, value in pairs:
                    self._set(made, [key, value])
            return made
        return Foreign(f"{function.module}.{function.name}")


_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
})  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,  # of what stands beside the weights; items need not be hashable
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
