"""float32 is float32 on every device; products of fewer bits are asked for by name."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.checkpoints.model_folder import restore, save_model
from glm_jax.config import ConfigError, GLMConfig
from glm_jax.engine.scoring import log_probabilities
from glm_jax.model import glm
from glm_jax.model import params as glm_params
from glm_jax.model.visibility import Visibility
from glm_jax.quantization import Scheme
from glm_jax.sharding import make_mesh
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import TrainBatch, init_state
from glm_jax.training.step import evaluation_step, train_step

# More than 128 keys, so that attention goes block by block.
LENGTH = 160
CONFIG = GLMConfig(1, 32, 64, 4, 96, LENGTH)
RECIPE = Recipe(total_samples=8, loss_chunk=32)


@pytest.fixture(scope="module")
def params():
    return glm_params.init(CONFIG, jax.random.key(0))


TOKENS = jnp.zeros((1, LENGTH), jnp.int32)


def _forward(config, params):
    visibility = Visibility.prefix(jnp.array([8]), LENGTH)
    return glm.forward(params, config, TOKENS, TOKENS, visibility)


def _score(config, params):
    ranges = jnp.zeros((1, LENGTH, 4), jnp.int32)
    some = TOKENS[:, :4]
    return log_probabilities(params, config, TOKENS, TOKENS, ranges, some, some)


def _batch():
    tokens = TOKENS[None]
    return TrainBatch(tokens, tokens, tokens.astype(jnp.float32), *[tokens] * 4)


def _train(config, params):
    state = init_state(config, RECIPE, jax.random.key(0), make_mesh((1, 1, 1)))
    return train_step(state, None, _batch(), jax.random.key(1), config, RECIPE, 1)


def _evaluate(config, params):
    return evaluation_step(params, None, _batch(), config, RECIPE, 1)


def _precisions(case, config, params):
    """What the products of float32 arrays ask for, in a program for NVIDIA GPUs."""
    traced = jax.jit(lambda params: case(config, params)).trace(params)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"stablehlo.dot_general .*", text)
    assert products
    assert all("xf32>" in product for product in products)
    asked = [re.findall(r"precision = \[(.*?)\]", product) for product in products]
    return {found[0] if found else "DEFAULT, DEFAULT" for found in asked}


@pytest.mark.parametrize("case", [_forward, _score, _train, _evaluate])
def test_every_product_of_float32_is_in_full(case, params):
    assert _precisions(case, CONFIG, params) == {"HIGHEST, HIGHEST"}
    fast = CONFIG.replace(compute_dtype="tensorfloat32")
    assert _precisions(case, fast, params) == {"HIGH, HIGH"}


@pytest.mark.parametrize("case", [_forward, _score])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_times_float32_are_in_full(case, scheme, params):
    params = glm_params.quantize_params(params, Scheme.parse(scheme))
    assert _precisions(case, CONFIG, params) == {"HIGHEST, HIGHEST"}


def test_what_jax_is_told_holds(params):
    with jax.default_matmul_precision("bfloat16"):
        assert _precisions(_forward, CONFIG, params) == {"DEFAULT, DEFAULT"}


def test_a_model_is_restored_to_tensorfloat32(params, tmp_path):
    save_model(tmp_path / "model", CONFIG, params)
    config, restored = restore(tmp_path / "model", dtype="tensorfloat32")
    assert (config.compute_dtype, config.activation_dtype) == ("tensorfloat32", "float32")
    assert config.param_dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert GLMConfig.from_json(config.to_json()) == config


def test_parameters_are_not_stored_as_tensorfloat32():
    with pytest.raises(ConfigError, match="param_dtype='tensorfloat32'"):
        CONFIG.replace(param_dtype="tensorfloat32")
