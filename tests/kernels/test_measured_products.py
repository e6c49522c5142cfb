"""Tables of measured products: what they say is what the dispatcher takes."""

import dataclasses
import importlib
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.extend import backend

import configs.hardware
from glm_jax.kernels import target
from glm_jax.kernels.quantized_matmul import measured
from glm_jax.kernels.quantized_matmul.api import BACKENDS, quantized_matmul
from glm_jax.kernels.quantized_matmul.arguments import Arguments
from glm_jax.kernels.quantized_matmul.measured import Entry, Product, Table, TableError
from glm_jax.kernels.quantized_matmul.pallas_gpu import PallasGPU
from glm_jax.quantization import Scheme, quantize
from launch.suites.tuned_products import Case, arguments_of

PACKAGED = sorted(measured.PACKAGED.glob("*.json"))
HARDWARE = [
    importlib.import_module(f"configs.hardware.{path.stem}").get_config()
    for path in Path(configs.hardware.__file__).parent.glob("[!_]*.py")
]
INPUTS, OUTPUTS = 1024, 64
WEIGHT = quantize(jnp.ones((INPUTS, OUTPUTS)), Scheme(4, 64, search=False), -2)
PRODUCT = Product("stored", 4, 64, False, INPUTS, OUTPUTS)
TRITON = PallasGPU(interpret=True, platform="cpu")


def _arguments(rows, dtype="float16"):
    return Arguments(jnp.ones((rows, INPUTS), dtype), WEIGHT)


def _measured(rows):
    return Table("cpu", {(PRODUCT, n): Entry(PRODUCT, n, "xla", None, 1.0, 1.0) for n in rows})


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Writes a table for this device with such an entry, and uses it."""

    def write(implementation, blocks=None, rows=8):
        entry = Entry(PRODUCT, rows, implementation, blocks, 2.0, 3.0)
        table = Table(target.device_kind(), {(PRODUCT, rows): entry})
        path = measured.path_in(tmp_path, target.device_kind())
        path.write_text(measured.to_text(table))
        assert measured.read(path) == table
        monkeypatch.setenv(measured.FOLDER, str(tmp_path))
        return path

    yield write
    measured.tables.cache_clear()


def _loops(x):
    """How many loops a product compiles to: one by tiles, which only "xla" has."""
    product = jax.jit(lambda x: quantized_matmul(x, WEIGHT))
    return product.lower(x).compile().as_text().count(" while(")


def test_the_dispatcher_takes_what_the_table_says(use):
    assert _loops(jnp.ones((5, INPUTS), "float16")) == 0
    use("xla")
    assert _loops(jnp.ones((5, INPUTS), "float16")) == 1
    assert _loops(jnp.ones((9, INPUTS), "float16")) == 0  # more rows than were measured
    assert _loops(jnp.ones((5, INPUTS), "float32")) == 0


def test_blocks_are_those_of_the_table(use):
    *_, last = measured.variants([TRITON], _arguments(8))
    blocks = dataclasses.asdict(last.blocks)
    assert last.blocks != TRITON._blocks(_arguments(8))
    path = use("pallas", blocks)
    first, *rest = measured.preferred([TRITON], _arguments(5))
    assert first == last
    assert rest == [TRITON]
    # Of an earlier version of the kernel: its rules choose.
    path.write_text(path.read_text().replace('"stages": ', '"stages": 7'))
    measured.tables.cache_clear()
    assert measured.preferred([TRITON], _arguments(5)) == [TRITON]


def test_a_backend_that_there_is_not(use):
    path = use("palas")
    with pytest.raises(TableError, match=f"{path}: no implementation is called 'palas'"):
        measured.preferred(BACKENDS, _arguments(5))


@pytest.mark.parametrize(
    ("rows", "nearest"),
    [(1, 1), (2, 8), (8, 8), (9, None), (31, None), (32, 128), (128, 128), (129, None),
     (600, 2048), (5000, 2048)],
)  # fmt: skip
def test_rows_are_rounded_up_to_near_ones(rows, nearest):
    entry = _measured((1, 8, 128, 2048)).nearest(PRODUCT, rows)
    assert (None if entry is None else entry.rows) == nearest


def test_every_number_of_rows_has_near_ones_that_are_measured():
    table = _measured(measured.ROWS)
    assert all(table.nearest(PRODUCT, rows) is not None for rows in range(1, 2050))


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.stem)
def test_tables_of_the_package_are_of_the_kernels_that_there_are(path, monkeypatch):
    table = measured.read(path)
    assert table.entries
    assert path.name == measured.path_in(path.parent, table.device).name
    [hardware] = [each for each in HARDWARE if each.device_kind == table.device]
    monkeypatch.setattr(target, "platform", lambda: "cuda")
    monkeypatch.setattr(target, "device_kind", lambda: table.device)
    monkeypatch.setattr(target, "compute_capability", lambda: hardware.compute_capability)
    device = types.SimpleNamespace(core_count=hardware.multiprocessors)
    monkeypatch.setattr(backend, "get_default_device", lambda: device)
    for (product, rows), entry in table.entries.items():
        first, *_ = measured.preferred(BACKENDS, arguments_of(Case(product, rows)))
        assert (first.name, measured.blocks_of(first)) == (entry.implementation, entry.blocks)


GOOD = {
    **dataclasses.asdict(PRODUCT), "rows": 1, "implementation": "xla", "blocks": None,
    "us": 1, "float16_us": 2.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "expected a table of format 1, got None: make it anew by glm-jax tune --measure"),
        ({"format": 2}, "expected a table of format 1, got 2"),
        ({"format": 1, "products": {}}, "expected lists `products` and `left_out`"),
        ({"format": 1, "products": [3]}, r"products\[0\]: expected an object, got 3"),
        ({"rows": 0}, r"products\[0\]: rows: expected int, got 0"),
        ({"rows": True}, r"products\[0\]: rows: expected int, got True"),
        ({"bits": "4"}, r"products\[0\]: bits: expected int, got '4'"),
        ({"us": float("nan")}, r"products\[0\]: us: expected float or int, got nan"),
        (
            {"float16_us": float("inf")},
            r"products\[0\]: float16_us: expected float or int, got inf",
        ),
        (
            {"format": 1, "products": [], "left_out": [3]},
            "expected lists `products` and `left_out`",
        ),
        ({"us": None}, r"products\[0\]: us: expected float or int, got None"),
        ({"blocks": [1]}, r"products\[0\]: blocks: expected dict or null, got \[1\]"),
        ({"implementation": 3}, r"products\[0\]: implementation: expected str, got 3"),
    ],
)
def test_damaged_tables_are_refused_in_a_line(tmp_path, record, message):
    path = tmp_path / "table.json"
    if isinstance(record, dict) and "format" not in record:
        record = {"format": 1, "device": "cpu", "products": [GOOD | record]}
    path.write_text(json.dumps(record))
    with pytest.raises(TableError, match=f"{path}: {message}"):
        measured.read(path)


def test_tables_that_are_not_there_or_no_json(tmp_path, monkeypatch):
    monkeypatch.setenv(measured.FOLDER, str(tmp_path / "none"))
    with pytest.raises(TableError, match=r"GLM_JAX_TABLES=.*none: there is no such folder"):
        jax.eval_shape(quantized_matmul, jnp.ones((1, INPUTS), "float16"), WEIGHT)
    assert measured.tables("no such device", str(tmp_path)) == {}
    path = measured.path_in(tmp_path, "NVIDIA H100 80GB HBM3")
    path.write_text(measured.to_text(Table("NVIDIA H200")))
    with pytest.raises(TableError, match="a table of 'NVIDIA H200', and this is NVIDIA H100 80GB"):
        measured.tables("NVIDIA H100 80GB HBM3", str(tmp_path))
    assert path.name == "nvidia_h100_80gb_hbm3.json"
    path.write_text("{")
    with pytest.raises(TableError, match=f"{path} is not JSON"):
        measured.tables("NVIDIA H100 80GB HBM3", str(tmp_path))
