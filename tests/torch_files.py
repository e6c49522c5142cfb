"""PyTorch's files with anything in them, written without PyTorch: its names stand in for it while
the standard library pickles."""

import dataclasses
import io
import pickle
import sys
import types
import zipfile

import numpy as np

from convert.torch_file import STORAGES, TorchFile
from convert.torch_writer import TorchWriter


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor that is a view of a larger array, which is stored whole."""

    array: np.ndarray
    base: np.ndarray


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that stays one of numpy's."""

    array: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Storage:
    pid: tuple


def read_module(path):
    """A shard's tensors by name."""
    return {name: tensor.read() for name, tensor in TorchFile(path).content["module"].items()}


def write_torch_file(path, module):
    """Writes `{"module": {name: tensor}}` as `torch.save` would."""
    with TorchWriter(path, {n: (a.shape, a.dtype) for n, a in module.items()}) as writer:
        for name, tensor in module.items():
            writer.write(name, tensor)


def save_torch(path, content, protocol=2, saved_as=None):
    """Writes what `torch.save` would of an object, where arrays and `View` are tensors, and an
    `Array` is one of numpy's.

    Args:
      protocol: of the pickle, from 1 on.
      saved_as: the name of the archive's folder, by default the file's.
    """
    storages, buffer = [], io.BytesIO()
    names = {name: type(name, (), {"__module__": "torch"}) for name in STORAGES}
    kinds = {dtype: names[name] for name, dtype in STORAGES.items()}

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("called while pickling")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.__dict__.update(names, _utils=utils)
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return item.pid if isinstance(item, _Storage) else None

        def reducer_override(self, item):
            if isinstance(item, Array):
                return item.array.__reduce_ex__(protocol)
            if isinstance(item, np.ndarray) and item.dtype in kinds:
                item = View(item, item)
            if not isinstance(item, View):
                return NotImplemented
            array, base = item.array, item.base
            places = [i for i, other in enumerate(storages) if other is base]
            if not places:
                storages.append(base)
            key = places[0] if places else len(storages) - 1
            storage = _Storage(("storage", kinds[base.dtype], str(key), "cpu", base.size))
            offset = (array.ctypes.data - base.ctypes.data) // base.itemsize
            strides = tuple(step // base.itemsize for step in array.strides)
            return _rebuild_tensor_v2, (storage, offset, array.shape, strides, False, {})

    hidden = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update({"torch": torch, "torch._utils": utils})
    try:
        Pickler(buffer, protocol).dump(content)
    finally:
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    root = saved_as or path.name.removesuffix(".pt")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", buffer.getvalue())
        for key, base in enumerate(storages):
            archive.writestr(f"{root}/data/{key}", base.tobytes())
