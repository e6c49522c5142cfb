"""Checkpoints of training runs: what lies beside the weights is passed over; none of it runs."""

import argparse
import collections
import contextlib
import datetime
import decimal
import enum
import functools
import pathlib
import random
import re
import shutil
import time
import types
import uuid
from collections.abc import Hashable

import jax
import numpy as np
import pytest
from conftest import GOLDEN, POSITIONS, load_golden
from torch_files import Array, read_module, save_torch

from convert.conversion import Options, convert_shards
from convert.torch_file import TorchFile
from glm_jax import restore

CHECKPOINTS = GOLDEN / "checkpoints"


class _State(dict):
    """A class of training code."""

    def __init__(self):
        super().__init__(loss=1.0)
        self.scale, self.seen = 2.0**16, {3}


class _Phase(enum.Enum):
    WARMUP = 1


# What training leaves beside the weights.
BESIDE = {
    "set": {1, "a", (2, 3)},
    "empty set": set(),
    "frozenset": frozenset([1, (2,)]),
    "bytes": b"abc\xff",
    "bytearray": bytearray(b"abc"),
    "complex": 1 - 2j,
    "numpy's random state": ("MT19937", Array(np.arange(624, dtype=np.uint32)), 3, 0, 0.0),
    "numpy's random object": np.random.RandomState(1),
    "numpy's generator": np.random.default_rng(1),
    "random's state": random.Random(1).getstate(),
    "random's object": random.Random(1),
    "numpy's number": np.float64(2.5),
    "numpy's bool": np.bool_(True),
    "numpy's array": Array(np.arange(3)),
    "array of objects": Array(np.array([{"a": {1}}, None], object)),
    "dtype": np.dtype("float32"),
    "structured dtype": np.dtype([("a", "f4")]),
    "defaultdict": collections.defaultdict(list, {"a": [1], (1, 2): [3]}),
    "OrderedDict": collections.OrderedDict(a=1),
    "Counter": collections.Counter("abca"),
    "deque": collections.deque([1], maxlen=3),
    "namespace": types.SimpleNamespace(lr=1e-4, seen={1}),
    "arguments": argparse.Namespace(lr=1e-4, names=["a"], seen=set()),
    "tuple": (1, (2, frozenset([3])), None),
    "class": _State,
    "object": _State(),
    "enum": _Phase.WARMUP,
    "time": datetime.datetime(2022, 7, 3, tzinfo=datetime.UTC),
    "struct_time": time.gmtime(0),
    "path": pathlib.PurePosixPath("/a/b"),
    "decimal": decimal.Decimal("1.5"),
    "uuid": uuid.UUID(int=5),
    "range": range(5),
    "slice": slice(1, 2),
    "partial": functools.partial(int, base=2),
    "pattern": re.compile("a+"),
    "constants": [None, True, Ellipsis, NotImplemented, 10**40, -1, float("nan")],
    "tensor": np.arange(4, dtype=np.float64),
}


def test_what_stands_beside_the_weights_is_left_alone(tmp_path):
    """Optimiser and arguments, of classes that are not here; inv_freq in either place."""
    folder = tmp_path / "in"
    shutil.copytree(CHECKPOINTS / "tp1", folder)
    path = folder / "49300" / "mp_rank_00_model_states.pt"
    module = read_module(path)
    frequencies = [name for name in module if name.endswith("inv_freq")]
    value = [module.pop(name) for name in frequencies][-1]
    module["transformer.rotary_emb.inv_freq"] = value
    save_torch(path, {"module": module, "iteration": 49300, "beside": BESIDE})
    convert_shards(folder, tmp_path / "out", Options(max_sequence_length=POSITIONS))
    _, expected = load_golden("tp1", "float16")
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "out")[1], expected)


@pytest.mark.parametrize("name", BESIDE)
def test_each_thing_that_training_leaves_is_passed_over(tmp_path, name):
    weight, thing = np.arange(12, dtype=np.float16).reshape(3, 4), BESIDE[name]
    content = {"first": thing, "module": {"w": weight}, "last": [thing, 7]}
    if isinstance(thing, Hashable) and not isinstance(thing, Array):
        with contextlib.suppress(TypeError):  # a tuple of what has no hash
            content["keys"] = {thing: 1, (1, thing): 2, "kept": 3}
    for protocol in range(1, 6):
        save_torch(tmp_path / "a.pt", content, protocol)
        found = TorchFile(tmp_path / "a.pt").content
        np.testing.assert_array_equal(found["module"]["w"].read(), weight)
        assert found["last"][1] == 7
        assert found.get("keys", {"kept": 3})["kept"] == 3


def test_dictionaries_of_weights_may_be_of_other_kinds(tmp_path):
    weight = np.arange(12, dtype=np.float16)
    kinds = (collections.OrderedDict(w=weight), collections.defaultdict(list, w=weight))
    for module in kinds:
        save_torch(tmp_path / "a.pt", {"module": module})
        np.testing.assert_array_equal(read_module(tmp_path / "a.pt")["w"], weight)
