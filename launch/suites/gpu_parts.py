"""What the GPU suite measures, each part in a process of its own:

    python -m launch.suites.gpu_parts products --shapes=full --output=products.jsonl

Results are written as JSON, one a line, as they come: a part that runs out of time has what it
reached. `--shapes=tiny` tries all of it on a CPU.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import cli, supervision
from glm_jax.checkpoints.model_folder import restore
from glm_jax.checkpoints.random_weights import is_random, random_model
from glm_jax.config import GLMConfig, glm_config
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.model.device_layout import prepare
from glm_jax.model.flops import training_flops
from glm_jax.quantization import QuantizedArray
from launch.suites.case import find_torch
from launch.suites.train_step import torch_step_case, train_step_case

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """How large everything is.

    Attributes:
      copied: bytes of the array that is read and copied.
      square: side of the matrices that are multiplied.
      products: inputs and outputs of weights.
      rows: of products, those that tell most first; `int8_rows` those of products in 8 bits.
      in_turn: bytes of weights that a product goes through in turn: more than a cache holds.
      batches: of decode steps; `prompt` and `answer` tokens of each request.
      prefills: tokens of prompts.
      heads: of attention over pages; `sequences` with `tokens` each.
      train: a named size, rows and tokens of a row.
    """

    copied: int
    square: int
    products: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    int8_rows: tuple[int, ...]
    in_turn: int
    batches: tuple[int, ...]
    prompt: int
    answer: int
    prefills: tuple[int, ...]
    heads: tuple[int, ...]
    sequences: int
    tokens: int
    train: tuple[str, int, int]


SHAPES = {
    # Products of the 130B: its four linears whole, and an eighth of each.
    "full": Shapes(
        copied=2 << 30,
        square=8192,
        products=(
            (12288, 36864),
            (12288, 12288),
            (12288, 65536),
            (32768, 12288),
            (12288, 4608),
            (1536, 12288),
            (12288, 8192),
            (4096, 12288),
        ),
        rows=(1, 32, 128, 2048, 8, 64, 16, 512),
        int8_rows=(1, 16, 128, 2048),
        in_turn=400 << 20,
        batches=(1, 32, 64, 8),
        prompt=100,
        answer=16,
        prefills=(128, 1900),
        heads=(96, 12),
        sequences=32,
        tokens=512,
        train=("1b", 8, 2048),
    ),
    "tiny": Shapes(
        copied=1 << 16,
        square=64,
        products=((256, 128),),
        rows=(1, 16),
        int8_rows=(1,),
        in_turn=1 << 15,
        batches=(1,),
        prompt=8,
        answer=3,
        prefills=(8,),
        heads=(2,),
        sequences=2,
        tokens=80,
        train=("tiny", 2, 32),
    ),
}
REPEATS = 5
PAGE = 64  # tokens
MAX_ERROR = 0.02  # see `error_of`
_MAX_WORDS = 200  # characters
_SPARE = 6 << 30  # bytes that programs need beside weights and cache
_PROGRAM_BYTES = 2 << 30  # of weights that a program of short products reads
_MAX_SHORT_ROWS = 64  # whose products take no longer than reading the weight


def seconds(run: Callable[[], object]) -> float:
    """Time a call."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def interleaved(runs: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of each, in rounds of all; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if number:
                times[name].append(taken)
    return {name: statistics.median(each) for name, each in times.items()}


def rates(shapes: Shapes) -> Iterator[Result]:
    """How fast memory is read, and copied (read and written); the rate of a large product."""
    yield {"read_TBps": read_rate(shapes) / 1e12}
    array = jnp.ones(shapes.copied // 2, jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    taken = interleaved({"copy": often(lambda: add(array))})["copy"] / REPEATS
    yield {"copy_TBps": 2 * array.nbytes / taken / 1e12}
    side = shapes.square
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    taken = interleaved({"product": often(lambda: product(x, x))})["product"] / REPEATS
    yield {"bfloat16_TFLOPs": 2 * side**3 / taken / 1e12}


def read_rate(shapes: Shapes) -> float:
    """Bytes a second."""
    array = jnp.ones(shapes.copied // 4, jnp.int32)
    largest = jax.jit(jnp.max)
    taken = interleaved({"read": often(lambda: largest(array))})["read"] / REPEATS
    return array.nbytes / taken


def often(run: Callable[[], object]) -> Callable[[], object]:
    """Return several runs as one, so that starting the work does not count; it returns the last
    result.

    Each result is dropped before the next run, which then has the same memory: for other
    addresses XLA would update its CUDA graphs.
    """

    def repeated() -> object:
        result = None
        for _ in range(REPEATS):
            result = None
            result = run()
        return result

    return repeated


def error_of(got: jax.Array, exact: jax.Array) -> float:
    """Return the largest error of a number, as a share of all numbers' root mean square."""
    difference = jnp.max(jnp.abs(got.astype(jnp.float32) - exact))
    return float(difference / jnp.sqrt(jnp.mean(exact**2)))


def words_of(error: Exception) -> str:
    """Return an error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_MAX_WORDS]


def turns_of(rows: int, size: int) -> int:
    """Return how many activations go through weights in one program.

    Where products are short, a GPU would wait for the host to start the next program.

    Args:
      size: bytes of all weights.
    """
    is_short = jax.default_backend() == "gpu" and rows <= _MAX_SHORT_ROWS
    return max(1, min(8, _PROGRAM_BYTES // size)) if is_short else 1


def bits_of(form: str) -> int:
    return int("".join(filter(str.isdigit, form)))


def copies_of(shapes: Shapes, size: int) -> int:
    return max(1, min(8, shapes.in_turn // size))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def example_weight(form: str, inputs: int, outputs: int, seed: int) -> Any:
    """Numbers that look random, by a program that is compiled at once."""
    bits = bits_of(form)
    shape = (inputs * min(bits, 8) // 8, outputs)
    place = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) * outputs
    place += jax.lax.broadcasted_iota(jnp.uint32, shape, 1) + jnp.uint32(seed)
    mixed = (place ^ (place >> 15)) * jnp.uint32(2654435761)
    values = (mixed >> 24).astype(jnp.uint8).astype(jnp.int8)
    if bits == 16:
        return values.astype(jnp.float16) / 128
    return QuantizedArray(values, jnp.full((1, outputs), 0.01, jnp.float16), bits, -2)


def decode(shapes: Shapes, checkpoint: str, quantization: str | None) -> Iterator[Result]:
    """Yield a decode step of several batches beside what reading its bytes takes, and prefills."""
    rate = read_rate(shapes)
    began = time.perf_counter()
    load = random_model if is_random(checkpoint) else restore
    config, params = load(checkpoint, quantization=quantization)
    params = jax.block_until_ready(prepare(params, donate=True))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    label = " ".join([checkpoint.split(":")[-1].upper(), (quantization or "float").upper()])
    made = time.perf_counter() - began
    yield {"model": label, "weights_GB": size / 1e9, "seconds_to_make": made}
    itemsize = jnp.dtype(config.activation_dtype).itemsize
    token_bytes = 2 * config.num_layers * config.hidden_size * itemsize
    request_tokens = -(-(shapes.prompt + 1 + shapes.answer) // PAGE) * PAGE
    free = _free_bytes() - _SPARE
    longest = -(-(max(shapes.prefills) + 2) // PAGE) * PAGE
    fitting = [batch for batch in shapes.batches if batch * request_tokens * token_bytes <= free]
    cache_tokens = max(longest, max(fitting, default=1) * request_tokens)
    for batch in shapes.batches:
        if batch not in fitting:
            yield {"batch": batch, "error": "no memory for its keys and values"}
            continue
        settings = EngineSettings(batch, cache_tokens=cache_tokens, prefill_width=shapes.prompt)
        engine = Engine(params, config, settings)
        _fill(engine, config, batch, shapes.prompt, 2)  # compiles
        step = _fill(engine, config, batch, shapes.prompt, shapes.answer)[1]
        read = size + batch * (shapes.prompt + shapes.answer) * token_bytes
        yield {"batch": batch, "step_ms": 1e3 * step, "limit_ms": 1e3 * read / rate}
        if batch == shapes.batches[0]:
            for tokens in shapes.prefills:
                _fill(engine, config, 1, tokens, 2)
                taken = statistics.median(
                    [_fill(engine, config, 1, tokens, 2)[0] for _ in range(3)]
                )
                yield {"prefill": tokens, "ms": 1e3 * (taken - step)}
        del engine


def _free_bytes() -> float:
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", float("inf")) - stats.get("bytes_in_use", 0)


def _fill(
    engine: Engine, config: GLMConfig, batch: int, prompt: int, answer: int
) -> tuple[float, float]:
    """Seconds until every request has its first token, and of a step after that (median)."""
    assert config.special_tokens is not None
    rng = np.random.default_rng(0)
    low, high = 10, min(20000, config.vocab_size - 10)
    for _ in range(batch):
        tokens = (*rng.integers(low, high, prompt - 1).tolist(), config.special_tokens.gmask)
        engine.submit(Request(Prompt(tokens, None), max_tokens=answer, end_tokens=()))
    first, times = seconds(engine.step), []
    while not engine.is_idle:
        times.append(seconds(engine.step))
    return first, statistics.median(times)


def train(shapes: Shapes, dropout: float, attention: str) -> Iterator[Result]:
    """Yield a train step of ours.

    Args:
      attention: see `Recipe`.
    """
    size, rows, length = shapes.train
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = glm_config(size, compute_dtype=dtype, max_sequence_length=length)
    case = train_step_case(model, rows, length, dropout, remat="dots", attention=attention)
    taken = interleaved({"step": case.run})["step"]
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    rate = training_flops(model, rows * length, length) / taken
    found = {"ms": 1e3 * taken, "peak_GB": peak / 1e9, "TFLOPs": rate / 1e12}
    yield {"program": "ours", "dropout": dropout} | found


def torch_train(shapes: Shapes, dropout: float) -> Iterator[Result]:
    """Yield the same step by torch.compile, in bfloat16 by autocast."""
    torch = find_torch()
    if torch is None:
        raise SystemExit("torch is not installed")
    if not torch.cuda.is_available() and shapes is SHAPES["full"]:
        raise SystemExit("torch has no CUDA")
    size, rows, length = shapes.train
    model = glm_config(size, max_sequence_length=length)
    case = torch_step_case(model, rows, length, dropout)
    taken = interleaved({"step": case.run})["step"]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    yield {"program": "torch.compile", "dropout": dropout, "ms": 1e3 * taken, "peak_GB": peak / 1e9}


def about() -> Result:
    """Return what a measurement was made with."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "part",
        choices=["rates", "checks", "products", "pages", "decode", "train", "torch_train"],
    )
    parser.add_argument("--shapes", choices=list(SHAPES), default="full")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", default="random:130b")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--attention", default="auto")
    options = parser.parse_args(arguments)
    cli.set_up_compiler()  # as a command's programs are compiled
    shapes = SHAPES[options.shapes]
    if options.shapes == "full" and jax.default_backend() != "gpu":
        raise SystemExit(
            "--suite=gpu needs a GPU that JAX can use; --shapes=tiny tries it on a CPU"
        )
    # They are made of what is here.
    from launch.suites.gpu_checks import checks
    from launch.suites.gpu_products import products
    from launch.suites.pages import pages

    parts: dict[str, Callable[[], Iterator[Result]]] = {
        "rates": lambda: rates(shapes),
        "checks": checks,
        "products": lambda: products(shapes),
        "pages": lambda: pages(shapes),
        "decode": lambda: decode(shapes, options.checkpoint, options.quantization),
        "train": lambda: train(shapes, options.dropout, options.attention),
        "torch_train": lambda: torch_train(shapes, options.dropout),
    }
    with options.output.open("a", encoding="utf-8") as file, warnings.catch_warnings():
        if options.part != "torch_train":  # which has the device to itself
            print(json.dumps(about()), file=file, flush=True)
        warnings.showwarning = functools.partial(_note_warning, file)
        for result in parts[options.part]():
            print(json.dumps(result), file=file, flush=True)


def _note_warning(file: Any, message: Warning | str, *_: Any, **__: Any) -> None:
    """Note what changes a measurement, such as a kernel that is not used."""
    print(json.dumps({"warning": str(message)}), file=file, flush=True)


if __name__ == "__main__":
    supervision.die_with_parent()
    main(sys.argv[1:])
