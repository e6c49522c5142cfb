"""Measures speed as ratios within one run: `make bench`.

    python -m launch.benchmark --suite=decode_step --output=bench_output

Every round runs each case once, so that a machine whose speed drifts drifts for all.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from glm_jax import cli
from glm_jax.config import GLMConfig, glm_config
from glm_jax.decoding.generate import DecodeState, decode_step
from glm_jax.model import params as glm_params
from glm_jax.model.cache import init_cache
from glm_jax.model.params import GLMParams

FLAGS = flags.FLAGS
flags.DEFINE_enum("suite", "decode_step", ["decode_step"], "what to measure")
flags.DEFINE_integer("rounds", 15, "timed runs of each case", lower_bound=3)
flags.DEFINE_string("output", "bench_output", "folder for SUITE.json")

Case = Callable[[], object]


def interleaved(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run of each case; a first round, which compiles, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for counted in [False] + [True] * rounds:
        for name, case in cases.items():
            began = time.perf_counter()
            jax.block_until_ready(case())
            if counted:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def decode_step_cases(config: GLMConfig) -> dict[str, Case]:
    """One token at batch 1, in every form, beside the limit and a peer.

    `stream` reads the bytes of the float32 layers and embedding once with all threads:
    no float32 step can be faster. `torch` is PyTorch's float32 linears of the same shapes
    one after another, without attention and norms.
    """
    params = glm_params.init(config, jax.random.key(0))
    unrolled = glm_params.unstack_layers(params)
    cases = {
        "stream": _stream_case(params),
        "float32 scanned": _step_case(config, params),
        "float32 unrolled": _step_case(config, unrolled),
    }
    for bits in (8, 4):
        quantized = glm_params.unstack_layers(glm_params.quantize_params(params, bits))
        cases[f"int{bits} unrolled"] = _step_case(config, quantized)
    peer = _torch_case(config)
    return cases if peer is None else cases | {"torch float32 linears": peer}


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
            lengths=one(),
            is_done=jnp.zeros(1, bool),
        )
    ]

    def step() -> object:
        logits, holder[0] = decode_step(params, config, holder[0])
        return logits

    return step


def _stream_case(params: GLMParams) -> Case:
    total = jax.jit(lambda tree: [jnp.max(x) for x in jax.tree.leaves(tree)])
    return lambda: total(params)


def _torch_case(config: GLMConfig) -> Case | None:
    try:
        import torch
    except ImportError:
        print("torch is not installed: the case `torch float32 linears` is left out")
        return None
    hidden, inner = config.hidden_size, config.inner_hidden_size
    shapes = [(3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    weights = [torch.randn(s) for _ in range(config.num_layers) for s in shapes]
    weights.append(torch.randn(config.vocab_size, hidden))
    inputs = {n: torch.randn(1, n) for n in (hidden, inner)}

    def step() -> object:
        with torch.inference_mode():
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        return None

    return step


def main() -> None:
    config = glm_config("1b", num_layers=4, vocab_size=32768, max_sequence_length=256)
    megabytes = 4 * glm_params.parameter_count(config) / 1e6
    seconds = interleaved(decode_step_cases(config), FLAGS.rounds)
    limit = statistics.median(seconds["stream"])
    print(f"{config.num_layers} layers of {config.hidden_size}, {megabytes:.0f} MB in float32")
    print(f"streaming read: {megabytes / 1e3 / limit:.1f} GB/s")
    print(f"{'case':<24}{'median ms':>10}{'min':>9}{'max':>9}{'times stream':>14}")
    rows = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        rows[name] = {"median_ms": 1e3 * median, "times_stream": median / limit, "seconds": times}
        low, high = 1e3 * min(times), 1e3 * max(times)
        print(f"{name:<24}{1e3 * median:>10.1f}{low:>9.1f}{high:>9.1f}{median / limit:>14.2f}")
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{FLAGS.suite}.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
