"""Prefill, then one token a step with a key/value cache; shapes never change."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.decoding import sampling as sampling_lib
from glm_jax.decoding.sampling import Sampling
from glm_jax.errors import UserError
from glm_jax.kernels.quantized_matmul import cpu
from glm_jax.kernels.quantized_matmul.api import is_quantized
from glm_jax.kernels.quantized_matmul.api import prepare as prepare_weight
from glm_jax.model import glm
from glm_jax.model.cache import KVCache, init_cache
from glm_jax.model.params import GLMParams, map_linears, unstack_layers
from glm_jax.model.visibility import Visibility
from glm_jax.quantization import Scheme, quantize
from glm_jax.sharding import mesh_of

_SMALLEST_BUCKET = 32
_EMBEDDING_GROUP = 128  # inputs that share a scale, of an embedding in 4 bits


class PromptError(UserError):
    """A prompt that the model cannot take; the message says why."""


class PrecisionError(UserError):
    """A precision that is not to be had here."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A context to complete.

    Attributes:
      context: token ids, a mask token among them, without sop.
      mask_position: every generated token is at this position, that of the [MASK] or
        [sMASK] to fill; None continues the positions, as for [gMASK].
    """

    context: tuple[int, ...]
    mask_position: int | None

    @classmethod
    def from_tokens(cls, tokens: Sequence[int], special: SpecialTokens) -> "Prompt":
        """Fills the first [MASK], else the first [sMASK], else [gMASK], which is appended
        where there is no mask at all."""
        context = tuple(int(token) for token in tokens)
        for mask in (special.mask, special.smask):
            if mask in context:
                return cls(context, context.index(mask))
        if special.gmask not in context:
            context += (special.gmask,)
        return cls(context, None)


@struct.dataclass
class DecodeState:
    """What a step needs and changes. All [batch]; index counts cache positions."""

    cache: KVCache
    tokens: Int[Array, " batch"]
    position_ids: Int[Array, " batch"]
    position_steps: Int[Array, " batch"]
    index: Int[Array, " batch"]
    is_done: Bool[Array, " batch"]


@struct.dataclass
class SamplingArrays:
    """`Sampling` of each row, on the device."""

    keys: Key[Array, " batch"]
    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]


def prepare(
    params: GLMParams, activation_bits: int | None = None, embedding_bits: int | None = None
) -> GLMParams:
    """Parameters in the form that decodes fastest here.

    On CPU a scan copies each layer's weights in every step, so layers are unstacked, and on
    a single CPU device kernels and embedding are laid out for the CPU kernel. Elsewhere the
    scanned form stays. Call it once where many prompts follow.

    Args:
      activation_bits: 8 to round activations too and multiply integers, of quantised
        weights alone: faster, for about half a percent of error a product.
      embedding_bits: 8 or 4 to quantise the embedding, which is also the output projection;
        in 4 bits with a scale for each 128 inputs.

    Raises:
      PrecisionError: one of these was asked for, and this is not one CPU device with the
        kernel built, or the kernel does not take the embedding's shape.
    """
    device, *others = jax.tree.leaves(params)[0].devices()
    is_one_cpu = device.platform == "cpu" and not others
    if (activation_bits or embedding_bits) and not (is_one_cpu and cpu.is_available()):
        raise PrecisionError(
            "activations and embedding in few bits are for one CPU device, and its kernel built: "
            "leave out activation_bits and embedding_bits"
        )
    if device.platform != "cpu":
        return params
    params = unstack_layers(params)
    if not is_one_cpu:
        return params
    params = map_linears(
        lambda _, linear: linear.replace(kernel=prepare_weight(linear.kernel, activation_bits)),  # type: ignore[attr-defined]
        params,
    )
    table = params.word_embeddings
    if not is_quantized(table):
        table = table.T
        if embedding_bits is not None:
            table = quantize(table, _embedding_scheme(embedding_bits, len(table)), -2)
        tiled = prepare_weight(table, activation_bits)
        is_tiled = isinstance(tiled, cpu.TiledArray)
        if embedding_bits is not None and not is_tiled:
            raise PrecisionError(
                f"embedding_bits={embedding_bits}: the CPU kernel takes widths that divide by "
                f"8, this model's is {table.shape[0]}; leave it out"
            )
        table = tiled if is_tiled else params.word_embeddings
    prepared: GLMParams = params.replace(word_embeddings=table)  # type: ignore[attr-defined]
    return prepared


def _embedding_scheme(bits: int, inputs: int) -> Scheme:
    groups = bits == 4 and inputs % _EMBEDDING_GROUP == 0
    return Scheme(bits, _EMBEDDING_GROUP if groups else None)


def generate(
    params: GLMParams,
    config: GLMConfig,
    prompts: Sequence[Sequence[int] | Prompt],
    *,
    max_length: int | None = None,
    sampling: Sampling | None = None,
    end_tokens: Sequence[int] | None = None,
    special_tokens: SpecialTokens | None = None,
    seed: int = 0,
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> list[list[int]]:
    """Completes each prompt.

    Args:
      prompts: token ids of a context with a mask token in it (else [gMASK] is added), or
        a `Prompt` that says more.
      max_length: context, sop and generated tokens together, the model's positions by
        default.
      sampling: greedy by default.
      end_tokens: generating one ends a row; eop and eos by default.
      special_tokens: the config's by default.
      seed: of the sampled strategies.
      on_tokens: called after each step with int32 [len(prompts)], -1 for finished rows.

    Returns:
      The generated tokens of each prompt, the end token included where there was one.

    Raises:
      PromptError: no prompts, special tokens unknown, or a prompt that leaves no room.
    """
    rows, special, limit, ends = resolve(prompts, config, max_length, end_tokens, special_tokens)
    sampling = sampling or Sampling()
    mesh = mesh_of(params)
    params = prepare(params)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        cache = init_cache(config, len(rows), bucket(limit), isinstance(params.layers, tuple), mesh)
        logits, state = prefill_prompts(params, config, rows, special.sop, cache)
        return _run_steps(params, config, logits, state, sampling, ends, limit, seed, on_tokens)


def resolve(
    prompts: Sequence[Sequence[int] | Prompt],
    config: GLMConfig,
    max_length: int | None,
    end_tokens: Sequence[int] | None,
    special_tokens: SpecialTokens | None,
) -> tuple[list[Prompt], SpecialTokens, int, tuple[int, ...]]:
    """`generate`'s arguments with defaults put in: prompts, special tokens, the most tokens
    of a row, and end tokens.

    Raises:
      PromptError: as `generate`.
    """
    special = special_tokens or config.special_tokens
    if special is None:
        raise PromptError("this model's special tokens are not known: pass special_tokens")
    limit = config.max_sequence_length if max_length is None else max_length
    rows = [p if isinstance(p, Prompt) else Prompt.from_tokens(p, special) for p in prompts]
    _check_prompts(rows, config, limit)
    return rows, special, limit, special.end_tokens if end_tokens is None else tuple(end_tokens)


def bucket(length: int) -> int:
    """The static length that serves `length`: the next power of two, at least 32."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _check_prompts(rows: Sequence[Prompt], config: GLMConfig, limit: int) -> None:
    if not rows:
        raise PromptError("no prompts")
    if limit > config.max_sequence_length:
        raise PromptError(
            f"max_length={limit} is past the model's {config.max_sequence_length} positions"
        )
    for i, row in enumerate(rows):
        if len(row.context) + 1 >= limit:
            raise PromptError(
                f"prompt {i} has {len(row.context)} tokens: with sop and one answer token it is "
                f"past {limit}; shorten it"
            )
        outside = [token for token in row.context if not 0 <= token < config.vocab_size]
        if outside:
            raise PromptError(f"prompt {i}: token {outside[0]} is not in the vocabulary")


def prefill_prompts(
    params: GLMParams, config: GLMConfig, rows: Sequence[Prompt], sop: int, cache: KVCache
) -> tuple[Float[Array, "batch vocab"], DecodeState]:
    """Runs all contexts, padded to one bucket on the right, and their sop."""
    lengths = np.array([len(row.context) + 1 for row in rows], np.int32)
    width = min(bucket(int(lengths.max())), bucket(config.max_sequence_length))
    tokens = np.zeros((len(rows), width), np.int32)
    position_ids = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : lengths[i]] = (*row.context, sop)
        position_ids[i, : lengths[i]] = np.arange(lengths[i])
        if row.mask_position is not None:
            position_ids[i, lengths[i] - 1] = row.mask_position
    logits, cache = prefill(params, config, tokens, position_ids, lengths, cache)
    last = position_ids[np.arange(len(rows)), lengths - 1]
    state = DecodeState(
        cache=cache,
        tokens=jnp.zeros(len(rows), jnp.int32),
        position_ids=jnp.asarray(last),
        position_steps=jnp.array([row.mask_position is None for row in rows], jnp.int32),
        index=jnp.asarray(lengths - 1),
        is_done=jnp.zeros(len(rows), bool),
    )
    return logits, state


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[Array, "batch seq"],
    position_ids: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    cache: KVCache,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Logits after each row's last token, and the cache filled with its keys and values.

    Args:
      lengths: real tokens of each row, its sop included; all before sop see each other.
    """
    visibility = Visibility.prefix(lengths - 1, tokens.shape[1])
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


@functools.partial(jax.jit, static_argnames=("is_greedy", "ends"), donate_argnames="state")
def choose(
    logits: Float[Array, "batch vocab"],
    state: DecodeState,
    settings: SamplingArrays,
    limit: Int[ArrayLike, ""],
    is_greedy: bool,
    ends: tuple[int, ...],
) -> tuple[Int[Array, " batch"], DecodeState]:
    """The next token of each row (-1 where the row had ended) and the state to run it.

    A row also ends with `limit` tokens, context and sop included.
    """
    is_done = state.is_done | (state.index + 1 >= limit)
    if is_greedy:
        chosen = sampling_lib.greedy(logits)
    else:
        keys = jax.vmap(jax.random.fold_in)(settings.keys, state.index)
        chosen = sampling_lib.sample(
            logits, keys, settings.temperature, settings.top_k, settings.top_p
        )
    emitted = jnp.where(is_done, -1, chosen)
    is_end = jnp.isin(chosen, jnp.array(ends, jnp.int32))
    moved = jnp.where(is_done, 0, 1)
    state = state.replace(  # type: ignore[attr-defined]
        tokens=chosen,
        position_ids=state.position_ids + state.position_steps * moved,
        index=state.index + moved,
        is_done=is_done | is_end,
    )
    return emitted, state


def _run_steps(
    params: GLMParams,
    config: GLMConfig,
    logits: Array,
    state: DecodeState,
    sampling: Sampling,
    ends: tuple[int, ...],
    limit: int,
    seed: int,
    on_tokens: Callable[[np.ndarray], None] | None,
) -> list[list[int]]:
    settings = sampling_arrays([sampling] * len(logits), seed)
    outputs: list[list[int]] = [[] for _ in range(len(logits))]
    steps = limit - 1 - int(np.min(np.asarray(state.index)))
    for step in range(steps):
        emitted, state = choose(logits, state, settings, limit, sampling.is_greedy, ends)
        tokens = np.asarray(emitted)
        if on_tokens is not None:
            on_tokens(tokens)
        for output, token in zip(outputs, tokens.tolist(), strict=True):
            if token >= 0:
                output.append(token)
        if bool(np.all(np.asarray(state.is_done))) or step + 1 == steps:
            break
        logits, state = decode_step(params, config, state)
    return outputs


def sampling_arrays(samplings: Sequence[Sampling], seed: int) -> SamplingArrays:
    """Settings of each row, with a key of its own."""
    keys = jax.random.split(jax.random.key(seed), len(samplings))
    return SamplingArrays(
        keys=keys,
        temperature=jnp.array([s.temperature or 1.0 for s in samplings], jnp.float32),
        top_k=jnp.array([s.top_k for s in samplings], jnp.int32),
        top_p=jnp.array([s.top_p for s in samplings], jnp.float32),
    )
