"""Eight CPU devices, run-time checks of annotated shapes, and the oracle's data."""

import importlib.util
import os
from importlib.metadata import version

# `make test-gpu` has the devices that there are, and the packages: see `one_device`.
_IS_ONE_DEVICE = "GLM_JAX_TEST_PLATFORMS" in os.environ
if not _IS_ONE_DEVICE:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Small programs, run once or twice: compiling them is most of a test's time.
    _flags = "--xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # 0.12 does not know the flag, and ends at it
        _flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", _flags)

from jaxtyping import install_import_hook

if not _IS_ONE_DEVICE or importlib.util.find_spec("beartype") is not None:
    install_import_hook("glm_jax", "beartype.beartype")

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

if not _IS_ONE_DEVICE:
    jax.config.update("jax_num_cpu_devices", 8)

from convert.sat_reader import SatCheckpoint
from glm_jax.config import GLMConfig, SpecialTokens, glm_config
from glm_jax.data import facts
from glm_jax.model import params as glm_params
from glm_jax.model.params import GLMParams
from glm_jax.tokenizer import Tokenizer, train_tokenizer

GOLDEN = Path(__file__).parent / "golden"
NUM_HEADS, POSITIONS = 8, 64
# Folders whose files use what another has compiled: none changes by patches what is compiled.
_SHARING = ("serving", "jobs", "generation")
_MOST_MAPPINGS = 20_000  # when a file begins, which may add twice as many


def pytest_configure() -> None:
    """Compiled programs are kept for the files that compile the same ones, by each process for
    itself: jax does not write them in one piece."""
    if not _IS_ONE_DEVICE and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update(
            "jax_compilation_cache_dir", tempfile.mkdtemp(prefix="glm_jax_in_process_")
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure() -> None:
    folder = jax.config.values["jax_compilation_cache_dir"]
    if folder is not None and Path(folder).name.startswith("glm_jax_in_process_"):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.path.relative_to(GOLDEN.parent).parts:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _not_too_many_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiled programs hold mappings of memory, of which Linux gives a process 65530: beyond
    them XLA ends by a segmentation fault."""
    shares = request.path.parent.name in _SHARING and _mappings() < _MOST_MAPPINGS
    if not shares:
        jax.clear_caches()
    yield
    if not shares:
        jax.clear_caches()


def _mappings() -> float:
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except FileNotFoundError:  # another system than Linux
        return math.inf


@pytest.fixture(scope="session")
def golden_special() -> SpecialTokens:
    ids = json.loads((GOLDEN / "decode.json").read_text())["special"]
    names = {"[MASK]": "mask", "[gMASK]": "gmask", "[sMASK]": "smask"}
    fields = {names.get(name, name.lower()): token for name, token in ids.items()}
    return SpecialTokens(**fields)


def load_golden(folder: str, dtype: str) -> tuple[GLMConfig, GLMParams]:
    """A checkpoint of the oracle, computing in `dtype`."""
    checkpoint = SatCheckpoint(GOLDEN / "checkpoints" / folder)
    config = checkpoint.config(NUM_HEADS, POSITIONS)
    blocks = [checkpoint.layer(config, i) for i in range(config.num_layers)]
    params = GLMParams(
        word_embeddings=jax.numpy.asarray(checkpoint.embedding(config)),
        layers=jax.tree.map(lambda *x: jax.numpy.stack(x), *blocks),
        final_layernorm=jax.tree.map(jax.numpy.asarray, checkpoint.final_layernorm()),
    )
    return config.replace(compute_dtype=dtype), params


@pytest.fixture(scope="session")
def golden_logits() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "logits.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def golden_float32(golden_special: SpecialTokens) -> tuple[GLMConfig, GLMParams]:
    config, params = load_golden("tp1", "float32")
    return config.replace(special_tokens=golden_special), params


@pytest.fixture(scope="session")
def tiny_model() -> tuple[GLMConfig, GLMParams]:
    """Random weights whose every axis divides by 8."""
    config = glm_config("tiny", num_heads=8, vocab_size=256, max_sequence_length=64)
    special = SpecialTokens(240, 241, 242, 243, 244, 245, 246, 247, 2)
    return config.replace(special_tokens=special), glm_params.init(config, jax.random.key(0))


@pytest.fixture(scope="session")
def corpus() -> facts.Corpus:
    return facts.build_corpus()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: Any, corpus: facts.Corpus) -> Tokenizer:
    return train_tokenizer(corpus.sentences, tmp_path_factory.mktemp("tokenizer"), 3000)


@pytest.fixture
def experiment(tmp_path: Path, tokenizer: Tokenizer, corpus: facts.Corpus) -> Any:
    """A small run of training."""
    from glm_jax.training.config import default_config  # of packages that `one_device` may lack

    (tmp_path / "text.txt").write_text("\n".join(corpus.sentences[:200]), encoding="utf-8")
    config = default_config("tiny", hidden_size=32, inner_hidden_size=64, vocab_size=4096)
    config.data.files = str(tmp_path / "text.txt")
    config.data.tokenizer = str(tokenizer.files[0].parent)
    config.data.sequence_length, config.data.batch_size = 48, 4
    config.optimizer.learning_rate = 1e-2
    config.steps, config.log_every, config.checkpoint_every = 24, 4, 8
    return config
