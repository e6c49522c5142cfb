"""Products are measured on this device, and those that follow are computed as the table says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels.quantized_matmul import measured
from glm_jax.kernels.quantized_matmul.api import BACKENDS, quantized_matmul
from glm_jax.kernels.quantized_matmul.arguments import Arguments
from glm_jax.quantization import QuantizedArray, dequantize
from launch.suites import tuning
from launch.suites.tuned_products import example

pytestmark = pytest.mark.gpu
SHAPE = (512, 256) if jax.default_backend() == "gpu" else (128, 64)


def test_a_table_is_measured_and_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "linear_shapes", lambda config, parallel: [SHAPE])
    request = tuning.Request(
        str(tmp_path), 300.0, ("random:tiny",), (1,), ("int4,group=64",), (8,), 4
    )
    table = tuning.measure_all(request)
    assert table.entries
    monkeypatch.setenv(measured.FOLDER, str(tmp_path))
    for (product, rows), entry in table.entries.items():
        x = 0.1 * jax.random.normal(jax.random.key(0), (rows - 1, SHAPE[0]), jnp.float16)
        weight = example(product, 0)
        first, *others = measured.preferred(BACKENDS, Arguments(x, weight))
        assert others == list(BACKENDS)
        assert (first.name, measured.blocks_of(first)) == (entry.implementation, entry.blocks)
        got = np.asarray(jax.jit(quantized_matmul)(x, weight), np.float64)
        stored: QuantizedArray = example(measured.Product("stored", 4, 64, False, *SHAPE), 0)
        exact = np.asarray(x, np.float64) @ np.asarray(dequantize(stored, jnp.float32), np.float64)
        assert np.linalg.norm(got - exact) < 1e-3 * np.linalg.norm(exact)
