"""Products with weights in every precision, alone and in a decode step, beside their peers."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.config import GLMConfig, glm_config
from glm_jax.engine import step_functions
from glm_jax.engine.page_pool import PAGE_SIZE, page_count, table_size
from glm_jax.engine.step_functions import Rows
from glm_jax.kernels.quantized_matmul.api import prepare as prepare_weight
from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.kernels.quantized_matmul.cpu import TiledArray
from glm_jax.model import params as glm_params
from glm_jax.model.device_layout import prepare
from glm_jax.model.layer_stacks import as_layers, unstack_layers
from glm_jax.model.params import GLMParams
from glm_jax.quantization import Scheme, quantize
from launch.suites.case import Case, find_torch

ROWS = (1, 4, 8, 32, 128)
MAX_ROWS_OF_COPIES = 8
SHAPES = ((4096, 16384), (16384, 4096))


def decode_step_suite() -> Iterator[tuple[str, dict[str, Case]]]:
    """Yield a decode step of the 1B model in every precision, beside a limit and a peer.

    `float32` has XLA's products. `stream float32` reads the bytes of all float32 weights
    once: no float32 step can be faster. `torch float32` is PyTorch's linears of the same
    shapes, without attention and norms. int8 and int4 have the embedding in as many bits
    but where it says otherwise; `a8` multiplies integers.
    """
    config = glm_config("1b", max_sequence_length=256)
    params = glm_params.init(config, jax.random.key(0))
    quantized = {
        bits: glm_params.quantize_params(params, Scheme(bits, search=False)) for bits in (8, 4)
    }
    forms = {"float32": unstack_layers(params)}
    del params  # 4.5 GB
    forms["float32 tiled"] = prepare(forms["float32"])
    for bits in (8, 4):
        name, prepared = f"int{bits}", prepare(quantized.pop(bits), embedding_bits=bits)
        table = forms["float32 tiled"].word_embeddings
        forms[f"{name} float32 embedding"] = dataclasses.replace(prepared, word_embeddings=table)
        forms[name], forms[f"{name} a8"] = prepared, with_integer_activations(prepared)
    peers = _torch_steps(config)
    for batch in (1, 8):
        cases = {name: _step_case(config, form, batch) for name, form in forms.items()}
        cases |= {name: Case(functools.partial(peer, batch)) for name, peer in peers.items()}
        size = 4e-9 * glm_params.parameter_count(config)
        title = f"decode step, 1B model, {size:.1f} GB in float32, batch {batch}"
        yield title, cases


def kernels_suite() -> Iterator[tuple[str, dict[str, Case]]]:
    """x [M, K] times a weight [K, N], ours beside XLA's and PyTorch's products.

    `stream int4` and such read as many bytes as that weight has, once, with PyTorch's
    threads: `tiled`, int8 and int4 are our kernel's, `a8` with activations in 8 bits. Few
    rows go through as many copies of a weight as have the bytes of the float32 one, like
    a model's layers: one copy in 4 bits alone would stay in a large cache.
    """
    for inputs, outputs in SHAPES:
        weight = jax.random.normal(jax.random.key(0), (inputs, outputs))
        bfloat16 = weight.astype(jnp.bfloat16)
        prepared: dict[str, tuple[int, Any]] = {  # bits and weight
            "float32": (32, weight),
            "bfloat16": (16, bfloat16),
            "float32 tiled": (32, prepare_weight(weight)),
            "bfloat16 tiled": (16, prepare_weight(bfloat16)),
        }
        for bits in (8, 4):
            quantized = quantize(weight, Scheme(bits, search=False), -2)
            prepared[f"int{bits}"] = bits, prepare_weight(quantized)
            prepared[f"int{bits} a8"] = bits, prepare_weight(quantized, activation_bits=8)
        weights = {name: _copies(bits, array) for name, (bits, array) in prepared.items()}
        peers = _torch_products(inputs, outputs)
        for rows in ROWS:
            x = jax.random.normal(jax.random.key(1), (rows, inputs))
            cases = {name: _products(x, arrays, rows) for name, arrays in weights.items()}
            cases |= {name: peer(rows) for name, peer in peers.items()}
            for name, bits in (("float32", 32), ("int8", 8), ("int4", 4)):
                cases |= stream_case(f"stream {name}", inputs * outputs * bits // 8, 32 // bits)
            yield f"K={inputs} N={outputs} M={rows}", cases


def _copies(bits: int, weight: Any) -> list[Any]:
    return [weight] + [jax.tree.map(jnp.copy, weight) for _ in range(32 // bits - 1)]


def _products(x: jax.Array, weights: list[Any], rows: int) -> Case:
    if isinstance(weights[0], jax.Array):
        x, product = x.astype(weights[0].dtype), jax.jit(jnp.matmul)
    else:
        product = jax.jit(quantized_matmul)
    weights = _few(weights, rows)
    return Case(lambda: [product(x, weight) for weight in weights], len(weights))


def _few(weights: list[Any], rows: int) -> list[Any]:
    """All copies of a weight where memory is the limit, one where arithmetic is."""
    return weights if rows <= MAX_ROWS_OF_COPIES else weights[:1]


def with_integer_activations(params: GLMParams) -> GLMParams:
    """Return the same weights, with activations rounded to 8 bits."""
    is_tiled = lambda leaf: isinstance(leaf, TiledArray)
    changed: GLMParams = jax.tree.map(
        lambda leaf: leaf.replace(activation_bits=8) if is_tiled(leaf) else leaf,
        params,
        is_leaf=is_tiled,
    )
    return changed


def _step_case(config: GLMConfig, params: GLMParams, batch: int) -> Case:
    rows, cache, pages_a_layer = decode_rows(config, params, batch, 100, 256)
    holder = [cache]

    def step() -> object:
        logits, holder[0] = step_functions.decode(params, config, rows, holder[0], pages_a_layer)
        return logits

    return Case(step)


def decode_rows(
    config: GLMConfig, params: GLMParams, batch: int, index: int, length: int
) -> tuple[Rows, Any, int]:
    """Rows, cache and pages per layer for `step_functions.decode`: `batch` sequences whose next
    token is at `index`, with pages for `length` tokens each."""
    count = page_count(length)
    pages = 1 + batch * count
    table = np.zeros((batch, table_size(length)), np.int32)
    table[:, :count] = 1 + np.arange(batch * count).reshape(batch, count)
    full = lambda *shape: np.full(shape, index, np.int32)
    one = (batch, 1)
    rows = Rows(np.ones(one, bool), np.ones(one, np.int32), full(*one), full(batch), table)
    cache = step_functions.make_cache(params, config, pages, PAGE_SIZE)
    return rows, cache, 0 if as_layers(params.layers).is_apart else pages


def stream_case(name: str, size: int, copies: int) -> dict[str, Case]:
    """Read `size` bytes of each copy by PyTorch's sum; XLA's on CPU is a fifth slower."""
    torch = find_torch()
    if torch is None:
        return {}
    arrays = [torch.ones(size // 4) for _ in range(copies)]
    return {name: Case(lambda: [numbers.sum() for numbers in arrays], copies)}


def _torch_steps(config: GLMConfig) -> dict[str, Callable[[int], None]]:
    """Return the linears of a decode step in PyTorch, and one reading of their weights."""
    torch = find_torch()
    if torch is None:
        return {}
    hidden, inner = config.hidden_size, config.inner_hidden_size
    shapes = [(3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    weights = [torch.ones(s) for _ in range(config.num_layers) for s in shapes]
    weights.append(torch.ones(config.vocab_size, hidden))

    def step(batch: int) -> None:
        inputs = {n: torch.ones(batch, n) for n in (hidden, inner)}
        with torch.inference_mode():
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    def stream(batch: int) -> None:
        for weight in weights:
            weight.sum()

    return {"torch float32": step, "stream float32": stream}


def _torch_products(inputs: int, outputs: int) -> dict[str, Callable[[int], Case]]:
    """PyTorch's products with float32, bfloat16, int8 and int4 (groups of 128) weights."""
    torch = find_torch()
    if torch is None:
        return {}
    x = torch.randn(max(ROWS), inputs)
    weight = torch.randn(outputs, inputs)
    x_bfloat16, bfloat16 = x.bfloat16(), weight.bfloat16()
    int8 = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    int8_scales = torch.rand(outputs, dtype=torch.bfloat16)
    nibbles = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    int4_scales = torch.rand(inputs // 128, outputs, 2, dtype=torch.bfloat16)
    linear, ops = torch.nn.functional.linear, torch.ops.aten
    products = {
        "torch float32": (32, weight, lambda m, w: linear(x[:m], w)),
        "torch bfloat16": (16, bfloat16, lambda m, w: linear(x_bfloat16[:m], w)),
        "torch int8": (
            8,
            int8,
            lambda m, w: ops._weight_int8pack_mm(x_bfloat16[:m], w, int8_scales),
        ),
        "torch int4": (
            4,
            int4,
            lambda m, w: ops._weight_int4pack_mm_for_cpu(x_bfloat16[:m], w, 128, int4_scales),
        ),
    }

    def case(bits: int, array: Any, product: Callable[[int, Any], object]) -> Any:
        copies = [array] + [array.clone() for _ in range(32 // bits - 1)]

        def of_rows(rows: int) -> Case:
            weights = _few(copies, rows)

            def run() -> None:
                with torch.inference_mode():
                    for weight in weights:
                        product(rows, weight)

            return Case(run, len(weights))

        return of_rows

    return {name: case(*parts) for name, parts in products.items()}
