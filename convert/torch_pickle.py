"""Read the pickle of a PyTorch file without running anything that it names.

A pickle is a program for a stack machine. The standard library's machine calls the functions that
the program names; this one builds only tensors and plain containers, and puts a `Foreign` in place
of every other object that training code stores with them. It refuses programs that name functions
of the standard library, which are attacks.
"""

import dataclasses
import pickletools
import sys
from collections.abc import Callable
from typing import Any

from convert.errors import ConvertError

# Modules of the standard library whose objects are data; Python 2 has other names for some.
_DATA_MODULES = frozenset({
    "_codecs", "_decimal", "_random", "argparse", "array", "collections", "copyreg", "datetime",
    "decimal", "enum", "fractions", "functools", "ipaddress", "itertools", "logging", "numbers",
    "pathlib", "random", "re", "time", "types", "typing", "uuid", "zoneinfo",
})  # fmt: skip
_BUILTINS = ("builtins", "__builtin__")
_DATA_BUILTINS = frozenset({
    "Ellipsis", "NotImplemented", "bool", "bytearray", "bytes", "complex", "dict", "float",
    "frozenset", "int", "list", "long", "object", "range", "set", "slice", "str", "tuple", "type",
    "unicode", "xrange",
})  # fmt: skip
_STANDARD_LIBRARY = sys.stdlib_module_names | {"__builtin__", "commands", "urllib2"}
# Classes of dictionaries, with the number of arguments before the pairs.
_DICTIONARIES = {"OrderedDict": 0, "defaultdict": 1}
_MAX_NAME = 1000  # characters
_MAX_KEY = 1 << 12  # characters of text, bits of a number: a key is hashed and compared
_MAX_ARGUMENTS = 16
_MARK = object()


@dataclasses.dataclass(frozen=True)
class Global:
    """A name in a module, from a pickle; never imported."""

    module: str
    name: str


_TENSOR_CLASSES = (Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter"))


@dataclasses.dataclass(frozen=True)
class Foreign:
    """An object that was not built: an instance of a class, or a function's result, by its name."""

    name: str


def load(
    data: bytes,
    where: str,
    rebuild: Callable[..., Any],
    open_storage: Callable[[Any], Any],
    max_steps: int,
) -> Any:
    """Return the object that a pickle describes.

    Args:
      where: name of the file, for messages.
      rebuild: builds a tensor from the arguments of PyTorch's `_rebuild_tensor_v2`.
      open_storage: returns the storage of a persistent id.
      max_steps: of the program; also the maximum of items in dictionaries that are built from
        pairs, which a program can use again.

    Raises:
      ConvertError: the pickle is broken, names what no checkpoint needs, or is too long.
    """
    machine = _Machine(where, rebuild, open_storage, max_steps)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= max_steps:
                raise ConvertError(f"{where}: its pickle has more than {max_steps} steps")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except ConvertError:
        raise
    except Exception as error:  # a broken program can go wrong anywhere
        raise ConvertError(f"{where}: its pickle cannot be read ({error})") from error
    raise ConvertError(f"{where}: its pickle has no end")


class _Machine:
    def __init__(self, where: str, rebuild: Any, open_storage: Any, max_items: int):
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._remaining_items = max_items
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
        mark = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK)
        items = stack[mark + 1 :]
        del stack[mark:]
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
                if _is_key(key):
                    target[key] = value
        elif not isinstance(target, Foreign):
            raise ConvertError(f"{self._where}: its pickle sets items of a {type(target).__name__}")

    def _append(self, _: Any) -> None:
        item = self.stack.pop()
        self._extend(self.stack[-1], [item])

    def _appends(self, _: Any) -> None:
        items = self._to_mark()
        self._extend(self.stack[-1], items)

    _additems = _appends

    def _extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Foreign):
            raise ConvertError(f"{self._where}: its pickle appends to a {type(target).__name__}")

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _pop_mark(self, _: Any) -> None:
        self._to_mark()

    _frozenset = _list  # items need not be hashable

    def _global(self, argument: str) -> None:
        self.stack.append(self._named(*argument.split(" ", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ConvertError(f"{self._where}: its pickle names something by no name")
        self.stack.append(self._named(module, name))

    def _named(self, module: str, name: str) -> Global:
        top = module.split(".")[0]
        is_data = name in _DATA_BUILTINS if module in _BUILTINS else top in _DATA_MODULES
        if len(module) + len(name) > _MAX_NAME:
            raise ConvertError(f"{self._where}: its pickle asks for a name of {len(name)} letters")
        if top in _STANDARD_LIBRARY and not is_data:
            raise ConvertError(
                f"{self._where}: its pickle asks for {module}.{name}, which no checkpoint needs; "
                "the file is refused and nothing of it was run"
            )
        return Global(module, name)

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(function, arguments))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        self.stack.pop()  # arguments by name
        self._reduce(None)

    def _obj(self, _: Any) -> None:
        function, *arguments = self._to_mark()
        self.stack.append(self._call(function, tuple(arguments)))

    def _inst(self, argument: str) -> None:
        function = self._named(*argument.split(" ", 1))
        self.stack.append(self._call(function, tuple(self._to_mark())))

    def _build(self, _: Any) -> None:
        self.stack.pop()  # attributes of an object that is not built, or that needs none

    def _binpersid(self, _: Any) -> None:
        self.stack.append(self._open_storage(self.stack.pop()))

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return the result of a call if it is a tensor or a dictionary, else a `Foreign`."""
        if isinstance(function, Foreign):
            return function
        if not isinstance(function, Global):
            raise ConvertError(f"{self._where}: its pickle calls a {type(function).__name__}")
        name = function.name
        if not isinstance(arguments, tuple):
            arguments = ()  # an object that was not built
        if function.module == "torch._utils" and len(arguments) <= _MAX_ARGUMENTS:
            if name == "_rebuild_tensor_v2":
                return self._rebuild(*arguments)
            if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
                return arguments[0]
        # A tensor with attributes.
        if function == Global("torch._tensor", "_rebuild_from_type_v2"):
            rebuild, kind, inner, _ = arguments
            if kind in _TENSOR_CLASSES and rebuild != function:
                return self._call(rebuild, inner)
        if function.module == "collections" and name in _DICTIONARIES:
            return self._dictionary(arguments[_DICTIONARIES[name] :])
        return Foreign(f"{function.module}.{name}")

    def _dictionary(self, arguments: Any) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for pairs in arguments:
            items = list(pairs.items()) if isinstance(pairs, dict) else pairs
            # Many calls can use the same pairs.
            self._remaining_items -= 1 + len(items)
            if self._remaining_items < 0:
                raise ConvertError(f"{self._where}: its pickle fills dictionaries without an end")
            for key, value in items:
                self._set(result, [key, value])
        return result


def _is_key(key: Any) -> bool:
    """Return whether an item with this key is stored: others are no weights, and to hash their keys
    (nested tuples, long numbers) could take years."""
    if isinstance(key, int):
        return key.bit_length() <= _MAX_KEY
    if isinstance(key, str | bytes):
        return len(key) <= _MAX_KEY
    return key is None or isinstance(key, float)


_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING",
    "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,  # contains no weights; items need not be hashable
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
