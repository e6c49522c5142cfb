"""Adapters beside weights in the layout of GPUs' kernels, on CPU devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import StopError, broken_at, losses, save_tiny

from glm_jax import restore
from glm_jax.kernels.quantized_matmul import mosaic_check
from glm_jax.kernels.quantized_matmul.api import MosaicArray
from glm_jax.model import gpu_layout
from glm_jax.model import params as glm_params
from glm_jax.model.adapters import AdapterConfig, attach
from glm_jax.model.adapters import specs as adapter_specs
from glm_jax.model.layer_stacks import unstack_layers
from glm_jax.planning.engine_programs import abstract_params
from glm_jax.quantization import QuantizedArray
from glm_jax.sharding import make_mesh
from glm_jax.training import finetuning
from glm_jax.training.finetuning import default_config, finetune
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import TrainBatch
from glm_jax.training.step import loss_sums

QUANTIZATION = "int4,group=32"
RECIPE = Recipe(total_samples=4, dropout=0.0, attention_dropout=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_tiny(folder, tokenizer)
    return folder


@pytest.fixture
def asked(monkeypatch):
    """The kinds whose check is asked for, where all devices are for the layout."""
    kinds = []
    monkeypatch.setattr(mosaic_check, "is_for", lambda device: True)
    monkeypatch.setattr(mosaic_check, "why_not", kinds.append)
    return kinds


def _batch():
    shape = (2, 16)
    tokens = jax.random.randint(jax.random.key(2), shape, 0, 4096)
    positions = jnp.broadcast_to(jnp.arange(16), shape)
    ones = jnp.ones(shape, jnp.int32)
    return TrainBatch(tokens, tokens, ones.astype("float32"), positions, ones * 4, ones, ones * 0)


def _restored(folder, mesh, layout=None):
    return restore(folder, mesh, "float16", QUANTIZATION, layout=layout)


def _loss_and_gradients(frozen, config, mesh):
    """Of adapters with random numbers."""
    fresh = glm_params.init_of(adapter_specs(config, AdapterConfig(2)), jax.random.key(1), mesh)
    adapters = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(3), x.shape), fresh)

    def loss(adapters):
        model = attach(frozen, adapters, 2.0)
        # As loss scaling does: gradients in float16 are small.
        return 1024 * loss_sums(model, config, _batch(), RECIPE, 1, None)[0]

    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss))(adapters)
    return jax.tree.leaves(jax.device_get(found))


@pytest.fixture(scope="module")
def of_stored(base):
    """Loss and gradients of one step on one device, with weights as they are stored."""
    mesh = make_mesh((1, 1, 1))
    config, frozen = _restored(base, mesh)
    return _loss_and_gradients(frozen, config, mesh)


@pytest.mark.parametrize(("sizes", "is_apart"), [((1, 1, 1), True), ((1, 2, 2), False)])
def test_a_step_is_that_of_weights_as_stored(base, of_stored, asked, sizes, is_apart):
    mesh = make_mesh(sizes)
    config, frozen = _restored(base, mesh, gpu_layout.layout_of_parts(mesh))
    kernels = [getattr(frozen.layers, name).kernel for name in glm_params.LINEAR_NAMES]
    assert all(isinstance(kernel, MosaicArray) for kernel in kernels)
    planned = abstract_params(config, mesh, QUANTIZATION, is_stacked=True)
    for plan, array in zip(jax.tree.leaves(planned), jax.tree.leaves(frozen), strict=True):
        assert (plan.shape, plan.dtype) == (array.shape, array.dtype)
        assert plan.sharding.is_equivalent_to(array.sharding, array.ndim)
    form = unstack_layers(frozen) if is_apart else frozen
    found = _loss_and_gradients(form, config, mesh)
    for exact, other in zip(of_stored, found, strict=True):
        assert np.linalg.norm(other - exact) < 2e-2 * np.linalg.norm(exact)


@pytest.fixture
def experiment(tmp_path):
    pairs = [{"prompt": f"{n} is [MASK].", "target": f"{n + 1}"} for n in range(64)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    config = default_config(rank=2)
    config.quantization, config.data.files = QUANTIZATION, str(tmp_path / "pairs.jsonl")
    config.data.sequence_length, config.data.batch_size = 32, 2
    config.steps, config.log_every, config.checkpoint_every = 4, 1, 2
    config.optimizer.remat = "none"
    return config


def test_a_run_begins_with_weights_laid_out(base, experiment, asked, tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(finetuning, "run_job", lambda job, *_: jobs.append(job) or [])
    finetune(experiment, base, tmp_path / "run")
    frozen = jobs[0].load_frozen()
    assert [{kind.bits for kind in kinds} for kinds in asked] == [{4}]
    assert all(isinstance(layer.dense.kernel, MosaicArray) for layer in frozen.layers)


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit_and_saves_adapters_alone(
    base, experiment, asked, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        broken_at(4, patched)
        with pytest.raises(StopError):
            finetune(experiment, base, tmp_path / "run")
    before = losses(tmp_path / "run")
    after = [line["loss"] for line in finetune(experiment, base, tmp_path / "run")]
    assert [{kind.bits for kind in kinds} for kinds in asked] == [{4}, {4}]
    assert sorted(before) == [1, 2, 3]
    assert after[0] == before[3]
    assert len(after) == 2
    _, adapted = restore(base, quantization=QUANTIZATION, adapter=tmp_path / "run" / "adapter")
    assert isinstance(adapted.layers.dense.kernel.frozen, QuantizedArray)
