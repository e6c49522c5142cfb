"""One update of a model by this project, and by PyTorch, as cases."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.config import GLMConfig
from glm_jax.sharding import make_mesh
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import TrainBatch, init_state
from glm_jax.training.step import compiled_train_step, with_attention_for
from launch.suites import torch_glm
from launch.suites.case import Case, find_torch


def random_tokens(model: GLMConfig, rows: int, length: int) -> np.ndarray:
    """int32 [rows, length]."""
    highest = min(8000, model.vocab_size)
    return np.random.default_rng(0).integers(0, highest, (rows, length)).astype(np.int32)


def train_step_case(
    model: GLMConfig,
    rows: int,
    length: int,
    dropout: float = 0.0,
    remat: str = "none",
    attention: str = "auto",
) -> Case:
    """Return an update on one device, half of each row context. Returns the step's metrics."""
    recipe = Recipe(
        total_samples=10**6,
        dropout=dropout,
        attention_dropout=dropout,
        attention=attention,
        remat=remat,
    )
    mesh = make_mesh((1, 1, 1))
    recipe = with_attention_for(model, recipe, mesh, rows, length)
    holder: list[Any] = [init_state(model, recipe, jax.random.key(0), mesh)]
    train_step = compiled_train_step(model, recipe, 1, mesh)
    shape = (1, rows, length)
    tokens = jnp.asarray(random_tokens(model, rows, length))[None]
    batch = TrainBatch(
        tokens=tokens,
        targets=tokens,
        loss_weights=jnp.ones(shape),
        position_ids=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape),
        context_length=jnp.full(shape, length // 2, jnp.int32),
        segment_ids=jnp.ones(shape, jnp.int32),
        groups=jnp.zeros(shape, jnp.int32),
    )

    def step() -> object:
        with jax.set_mesh(mesh):
            holder[0], metrics = train_step(holder[0], None, batch, jax.random.key(1))
        return metrics

    return Case(step)


def torch_step_case(
    model: GLMConfig,
    rows: int,
    length: int,
    dropout: float = 0.0,
    *,
    compiles: bool = True,
    mask: Any = None,
) -> Case:
    """PyTorch's update, on a GPU in bfloat16 by autocast where there is one.

    Args:
      mask: bool [length, length], what each token sees; those before it by default.
    """
    torch = find_torch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.from_numpy(random_tokens(model, rows, length)).long().to(device)
    positions = torch.arange(length, device=device).expand(rows, length)
    peer = torch_glm.build(model, dropout).to(device)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(peer) if compiles else peer
    few_bits: Any = contextlib.nullcontext
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        few_bits = lambda: torch.autocast("cuda", torch.bfloat16)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with few_bits():
            logits = forward(tokens, positions, mask, is_causal=mask is None)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return Case(step)
