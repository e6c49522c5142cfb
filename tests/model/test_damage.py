"""Model folders and adapters that are not what was written: nothing is read in silence."""

import random
import shutil

import jax
import numpy as np
import pytest

from glm_jax.config import glm_config
from glm_jax.errors import UserError
from glm_jax.model import params as glm_params
from glm_jax.model.checkpoint import restore, save_model

CONFIG = glm_config("tiny", vocab_size=64, hidden_size=32, inner_hidden_size=64, num_heads=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "model"
    params = glm_params.init(CONFIG, jax.random.key(0))
    save_model(folder, CONFIG, params)
    return folder, params


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "model")


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _flipped(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _zeroed(path, rng):
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    while not any(content[start : start + 64]):
        start = rng.randrange(len(content))
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes(content)


@pytest.mark.parametrize("change", [_flipped, _zeroed])
def test_a_change_at_any_place_of_any_file_of_parameters_is_found(change, folder):
    rng = random.Random(0)
    for path in _files(folder / "params"):
        content = path.read_bytes()
        for _ in range(3 if len(content) > 4096 else 1):
            if content:
                change(path, rng)
                with pytest.raises(UserError, match=r"is damaged|has no checksum"):
                    restore(folder)
                path.write_bytes(content)
    restore(folder)
