"""What `launch.benchmark` measures: named cases, each a function that does the work once."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.config import GLMConfig, glm_config
from glm_jax.decoding.generate import DecodeState, decode_step, prepare
from glm_jax.kernels.quantized_matmul.api import prepare as prepare_weight
from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.model import params as glm_params
from glm_jax.model.cache import init_cache
from glm_jax.model.params import GLMParams
from glm_jax.quantization import Scheme, quantize

Case = Callable[[], object]
ROWS = (1, 4, 8, 32, 128)
SHAPES = ((4096, 16384), (16384, 4096))


def decode_step_suite() -> Iterator[tuple[str, dict[str, Case]]]:
    """One token at batch 1 in every form, beside a limit and a peer.

    `stream` reads the bytes of all float32 weights once: no float32 step can be faster.
    `torch float32` is PyTorch's linears of the same shapes, without attention and norms.
    """
    config = glm_config("1b", num_layers=4, vocab_size=32768, max_sequence_length=256)
    params = glm_params.init(config, jax.random.key(0))
    cases = {
        "stream": _stream_case(params),
        "float32 scanned": _step_case(config, params),
        "float32": _step_case(config, prepare(params)),
    }
    for bits in (8, 4):
        quantized = glm_params.quantize_params(params, Scheme(bits))
        cases[f"int{bits}"] = _step_case(config, prepare(quantized))
    megabytes = 4 * glm_params.parameter_count(config) / 1e6
    title = f"decode step, {config.num_layers} layers of {config.hidden_size}, {megabytes:.0f} MB"
    yield title, cases | _torch_step_case(config)


def kernels_suite() -> Iterator[tuple[str, dict[str, Case]]]:
    """x [M, K] times a weight [K, N], ours beside XLA's and PyTorch's products.

    `stream` reads the bytes of the float32 weight once.
    """
    for inputs, outputs in SHAPES:
        weight = jax.random.normal(jax.random.key(0), (inputs, outputs))
        tiled = {
            f"int{bits}": prepare_weight(quantize(weight, Scheme(bits), -2)) for bits in (8, 4)
        }
        peers = _torch_products(inputs, outputs)
        for rows in ROWS:
            x = jax.random.normal(jax.random.key(1), (rows, inputs))
            product = jax.jit(quantized_matmul)
            cases: dict[str, Case] = {
                "stream": _stream_case(weight),
                "float32": functools.partial(jax.jit(jnp.matmul), x, weight),
            }
            for name, array in tiled.items():
                cases[name] = functools.partial(product, x, array)
            cases |= {name: functools.partial(peer, rows) for name, peer in peers.items()}
            yield f"K={inputs} N={outputs} M={rows}", cases


def _step_case(config: GLMConfig, params: GLMParams) -> Case:
    def one() -> jax.Array:  # a state is donated: no array may be in it twice
        return jnp.ones(1, jnp.int32)

    holder: list[Any] = [
        DecodeState(
            cache=init_cache(config, 1, 256, isinstance(params.layers, tuple)),
            tokens=one(),
            position_ids=one(),
            position_steps=one(),
            index=one(),
            is_done=jnp.zeros(1, bool),
        )
    ]

    def step() -> object:
        logits, holder[0] = decode_step(params, config, holder[0])
        return logits

    return step


def _stream_case(tree: Any) -> Case:
    largest = jax.jit(lambda tree: [jnp.max(x) for x in jax.tree.leaves(tree)])
    return lambda: largest(tree)


def _torch() -> Any:
    # Some virtual machines announce AMX and then refuse its instructions.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    try:
        import torch
    except ImportError:
        print("torch is not installed: its cases are left out")
        return None
    return torch


def _torch_step_case(config: GLMConfig) -> dict[str, Case]:
    torch = _torch()
    if torch is None:
        return {}
    hidden, inner = config.hidden_size, config.inner_hidden_size
    shapes = [(3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    weights = [torch.randn(s) for _ in range(config.num_layers) for s in shapes]
    weights.append(torch.randn(config.vocab_size, hidden))
    inputs = {n: torch.randn(1, n) for n in (hidden, inner)}

    def step() -> None:
        with torch.inference_mode():
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return {"torch float32": step}


def _torch_products(inputs: int, outputs: int) -> dict[str, Callable[[int], None]]:
    """PyTorch's products with float32, bfloat16, int8 and int4 (groups of 128) weights."""
    torch = _torch()
    if torch is None:
        return {}
    x = torch.randn(max(ROWS), inputs)
    weight = torch.randn(outputs, inputs)
    narrow_x, narrow = x.bfloat16(), weight.bfloat16()
    int8 = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    int8_scales = torch.rand(outputs, dtype=torch.bfloat16)
    nibbles = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    int4_scales = torch.rand(inputs // 128, outputs, 2, dtype=torch.bfloat16)
    linear, ops = torch.nn.functional.linear, torch.ops.aten
    calls = {
        "torch float32": lambda m: linear(x[:m], weight),
        "torch bfloat16": lambda m: linear(narrow_x[:m], narrow),
        "torch int8": lambda m: ops._weight_int8pack_mm(narrow_x[:m], int8, int8_scales),
        "torch int4": lambda m: ops._weight_int4pack_mm_for_cpu(
            narrow_x[:m], int4, 128, int4_scales
        ),
    }

    def quiet(call: Callable[[int], object]) -> Callable[[int], None]:
        def run(rows: int) -> None:
            with torch.inference_mode():
                call(rows)

        return run

    return {name: quiet(call) for name, call in calls.items()}
