"""A batch whose rows begin together: prefill, then one token a row and step.

Each row has a cache of the same length. Beam search runs on this; requests that come and go
run on `engine`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from glm_jax.config import GLMConfig
from glm_jax.engine.prompt import Prompt, bucket
from glm_jax.model import glm
from glm_jax.model.cache import KVCache
from glm_jax.model.params import GLMParams
from glm_jax.model.visibility import Visibility


@struct.dataclass
class DecodeState:
    """What a step needs and changes. All [batch]; index counts cache positions."""

    cache: KVCache
    tokens: Int[Any, " batch"]
    position_ids: Int[Any, " batch"]
    position_steps: Int[Any, " batch"]
    index: Int[Any, " batch"]


def prefill_prompts(
    params: GLMParams, config: GLMConfig, rows: Sequence[Prompt], sop: int, cache: KVCache
) -> tuple[Float[Array, "batch vocab"], DecodeState]:
    """Runs all contexts, padded to one bucket on the right, and their sop and prefix."""
    padded = pad_prompts(config, rows, sop)
    _, position_ids, lengths, _ = padded
    logits, cache = prefill(params, config, *padded, cache)
    last = position_ids[np.arange(len(rows)), lengths - 1]
    state = DecodeState(
        cache=cache,
        tokens=jnp.zeros(len(rows), jnp.int32),
        position_ids=jnp.asarray(last),
        position_steps=jnp.array([row.position_step for row in rows], jnp.int32),
        index=jnp.asarray(lengths - 1),
    )
    return logits, state


def pad_prompts(
    config: GLMConfig, rows: Sequence[Prompt], sop: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What `prefill` takes of prompts: tokens, position_ids, lengths and contexts."""
    lengths = np.array([len(row) for row in rows], np.int32)
    width = min(bucket(int(lengths.max())), bucket(config.max_sequence_length))
    tokens = np.zeros((len(rows), width), np.int32)
    position_ids = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : lengths[i]] = row.tokens(sop)
        position_ids[i, : lengths[i]] = row.position_ids()
    return tokens, position_ids, lengths, np.array([len(row.context) for row in rows], np.int32)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[Array, "batch seq"],
    position_ids: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    contexts: Int[Array, " batch"],
    cache: KVCache,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Logits after each row's last token, and the cache filled with its keys and values.

    Args:
      lengths: real tokens of each row, its sop included.
      contexts: of them, those before sop, which see each other.
    """
    visibility = Visibility.prefix(contexts, tokens.shape[1])
    hidden, cache_out = glm.forward_hidden(
        params, config, tokens, position_ids, visibility, cache, jnp.zeros_like(lengths)
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    assert cache_out is not None
    return glm.logits(params, config, last), cache_out


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode_step(
    params: GLMParams, config: GLMConfig, state: DecodeState
) -> tuple[Float[Array, "batch vocab"], DecodeState]:
    """Logits after the state's tokens, whose keys and values join the cache."""
    key_ranges = jnp.stack([jnp.zeros_like(state.index), state.index + 1], axis=-1)
    hidden, cache = glm.forward_hidden(
        params,
        config,
        state.tokens[:, None],
        state.position_ids[:, None],
        Visibility(key_ranges[:, None]),
        state.cache,
        state.index,
    )
    logits = glm.logits(params, config, hidden[:, 0])
    return logits, state.replace(cache=cache)  # type: ignore[attr-defined]
