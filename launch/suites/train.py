"""A train step beside PyTorch's, and beside what its matrix products alone would take."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.data.objective import ObjectiveConfig
from glm_jax.data.pipeline import Batches, Mixture
from glm_jax.data.records import Record, in_memory
from glm_jax.sharding import make_mesh
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import Batch, init_state
from glm_jax.training.step import compiled_train_step
from launch.suites import torch_glm
from launch.suites.case import Case, find_torch

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
    model = config()
    cases = {"ours": _step_case(model), "peak": _peak_case(model)}
    cases |= {"input pipeline": _pipeline_case()} | _torch_cases(model)
    title = f"train step, {BATCH} x {LENGTH} tokens, {model.num_layers} layers of 512, float32"
    yield title, cases


def flops(model: GLMConfig) -> float:
    """Operations of the products of one update: six a parameter and token, and attention."""
    layer = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.inner_hidden_size
    weights = model.num_layers * layer + model.vocab_size * model.hidden_size
    attention = 2 * model.num_layers * LENGTH * model.hidden_size
    return 6.0 * BATCH * LENGTH * (weights + attention)


def _tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 8000, (BATCH, LENGTH)).astype(np.int32)


def _step_case(model: GLMConfig) -> Case:
    recipe = Recipe(total_samples=10**6, dropout=0.0, attention_dropout=0.0)  # as the peer
    mesh = make_mesh((1, 1, 1))
    holder: list[Any] = [init_state(model, recipe, jax.random.key(0), mesh)]
    train_step = compiled_train_step(model, recipe, 1, mesh)
    shape = (1, BATCH, LENGTH)
    batch = Batch(
        tokens=jnp.asarray(_tokens())[None],
        targets=jnp.asarray(_tokens())[None],
        loss_weights=jnp.ones(shape),
        position_ids=jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), shape),
        context_length=jnp.full(shape, LENGTH // 2, jnp.int32),
        segment_ids=jnp.ones(shape, jnp.int32),
        groups=jnp.zeros(shape, jnp.int32),
    )

    def step() -> object:
        with jax.set_mesh(mesh):
            holder[0], metrics = train_step(holder[0], None, batch, jax.random.key(1))
        return metrics

    return Case(step)


def _peak_case(model: GLMConfig) -> Case:
    square = jax.random.normal(jax.random.key(0), (_PEAK_SIZE, _PEAK_SIZE))
    product = jax.jit(jnp.matmul)
    count = 8
    # `count` products take this part of the step's operations.
    part = count * 2 * _PEAK_SIZE**3 / flops(model)
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
    tokens = torch.from_numpy(_tokens()).long()
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    rows = torch.arange(LENGTH)
    mask = (rows[None] <= rows[:, None]) | (rows[None] < LENGTH // 2)

    def case(compile_it: bool) -> Case:
        peer = torch_glm.build(model)
        optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True)
        forward = torch.compile(peer) if compile_it else peer

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            logits = forward(tokens, positions, mask)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
            optimizer.step()

        return Case(step)

    return {"torch eager": case(False), "torch.compile": case(True)}
