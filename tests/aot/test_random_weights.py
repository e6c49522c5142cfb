"""Making a layer of random weights takes no room beyond that layer."""

import jax
import pytest
from aot.compiling import hardware

from glm_jax.checkpoints import random_weights
from glm_jax.config import glm_130b
from glm_jax.model.streamed_layers import device_bytes
from glm_jax.planning import topology
from glm_jax.quantization import Scheme
from glm_jax.sharding import make_mesh


@pytest.mark.parametrize(("quantization", "count"), [(None, 1), ("int4", 8)])
def test_no_float_copy_nor_any_other(quantization, count):
    config = glm_130b()
    scheme = quantization and Scheme.parse(quantization)
    mesh = make_mesh((1, 1, count), topology.devices(hardware("h100"), count))
    layers = random_weights.described_params(config, mesh, scheme).layers
    key = jax.eval_shape(lambda: jax.random.key(0))
    with topology.compiling_for(mesh):
        compiled = random_weights.layer_maker(config, layers, scheme).lower(key).compile()
    taken = compiled.memory_analysis()
    layer = device_bytes(layers) / config.num_layers
    assert taken.output_size_in_bytes == pytest.approx(layer, rel=0.01)
    assert taken.temp_size_in_bytes < 1 << 20
