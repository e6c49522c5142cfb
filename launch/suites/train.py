"""A train step beside PyTorch's, and beside what its matrix products alone would take."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.allocator import keep_freed_memory
from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.data.objective import ObjectiveConfig
from glm_jax.data.pipeline import Batches, Mixture
from glm_jax.data.records import Record, in_memory
from glm_jax.model.flops import training_flops
from launch.suites.case import Case, find_torch
from launch.suites.train_step import torch_step_case, train_step_case

BATCH, LENGTH = 4, 512
_PEAK_SIZE = 2048


def config() -> GLMConfig:
    return GLMConfig(
        num_layers=8,
        hidden_size=512,
        inner_hidden_size=1408,
        num_heads=8,
        vocab_size=8192,
        max_sequence_length=LENGTH,
    )


def train_suite() -> Iterator[tuple[str, dict[str, Case]]]:
    """One update of a small model, float32, 4 sequences of 512 tokens, half of each context.

    `peak` multiplies matrices as large as do the step's number of operations, at the rate
    of XLA's product of 2048 x 2048: no step can be faster. `input pipeline` makes the
    samples of one step's batch, and packs them.
    """
    keep_freed_memory()  # as `launch.train` does; PyTorch's steps profit too
    model = config()
    cases = {"ours": train_step_case(model, BATCH, LENGTH), "peak": _peak_case(model)}
    cases |= {"input pipeline": _pipeline_case()} | _torch_cases(model)
    title = f"train step, {BATCH} x {LENGTH} tokens, {model.num_layers} layers of 512, float32"
    yield title, cases


def _peak_case(model: GLMConfig) -> Case:
    square = jax.random.normal(jax.random.key(0), (_PEAK_SIZE, _PEAK_SIZE))
    product = jax.jit(jnp.matmul)
    count = 8
    # `count` products take this part of the step's operations.
    part = count * 2 * _PEAK_SIZE**3 / training_flops(model, BATCH * LENGTH, LENGTH)
    return Case(lambda: [product(square, square) for _ in range(count)], part)


def _pipeline_case() -> Case:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 450, 2000)
    records = [Record(rng.integers(0, 8000, n).astype(np.int32)) for n in lengths]
    batches = Batches(
        Mixture(
            datasets=[in_memory("text", records)],
            weights=[1.0],
            special=SpecialTokens(8001, 8002, 8003, 8004, 8005, 8006, 8007, 8008, 2),
            objective=ObjectiveConfig(),
            sequence_length=LENGTH,
            rows=BATCH,
            streams=BATCH,
            seed=0,
        )
    )
    count = 20
    return Case(lambda: [next(batches) for _ in range(count)], count)


def _torch_cases(model: GLMConfig) -> dict[str, Case]:
    torch = find_torch()
    if torch is None:
        return {}
    rows = torch.arange(LENGTH)
    mask = (rows[None] <= rows[:, None]) | (rows[None] < LENGTH // 2)
    return {
        name: torch_step_case(model, BATCH, LENGTH, compiles=compiles, mask=mask)
        for name, compiles in (("torch eager", False), ("torch.compile", True))
    }
