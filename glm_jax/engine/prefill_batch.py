"""Prompts that are prefilled together, one after another in a row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Int

from glm_jax.engine.page_pool import PageAllocation
from glm_jax.engine.prompt import Prompt
from glm_jax.model.paged_cache import Paging
from glm_jax.model.visibility import Visibility

_MIN_WIDTH, _MIN_WIDTH_STEP = 32, 16


@struct.dataclass
class PrefillBatch:
    """Prompts after one another; a row for each group of devices that has its own slots.

    Attributes:
      tokens, position_ids: int32 [rows, seq]; padding at the end.
      visibility: each prompt's tokens see their own context, or padding itself.
      paging: where keys and values go.
      adapter_ids: int32 [rows, seq], see `Prompt.adapter`.
    """

    tokens: Int[Any, "rows seq"]
    position_ids: Int[Any, "rows seq"]
    visibility: Visibility
    paging: Paging
    adapter_ids: Int[Any, "rows seq"]


def prefill_widths(longest: int) -> list[int]:
    """Return the widths that a batch may have, so that `longest` fits: 32, 48, 64, .., 256, 288,
    .., from 128 on eight to each doubling, so that one in twenty tokens is padding."""
    widths = [_MIN_WIDTH]
    while widths[-1] < longest:
        octave = 1 << (widths[-1].bit_length() - 1)
        widths.append(widths[-1] + max(octave // 8, _MIN_WIDTH_STEP))
    return widths


def prefill_width(length: int) -> int:
    """Return the narrowest of `prefill_widths` that holds `length` tokens."""
    return prefill_widths(length)[-1]


def prefill_length(prompt: Prompt) -> int:
    """Tokens that are prefilled: all but the last, which a step runs."""
    return len(prompt) - 1


def fitting_width(
    prompts: Sequence[tuple[Prompt, PageAllocation]], shards: int, at_least: int
) -> int:
    """Return the narrowest width that holds these prompts, each in its allocation's shard.

    Args:
      at_least: tokens that it holds anyway.
    """
    used = [0] * shards
    for prompt, allocation in prompts:
        used[allocation.shard] += prefill_length(prompt)
    return prefill_width(max(at_least, *used))


def make_prefill_batch(
    prompts: Sequence[tuple[Prompt, PageAllocation]],
    shards: int,
    width: int,
    page_size: int,
    pages_a_layer: int,
    sop: int,
) -> PrefillBatch:
    """Arrays of numpy; a prompt's row is its allocation's shard.

    Args:
      prompts: each with pages for its tokens at least.
      width: of a row, which holds all that goes there.
      pages_a_layer: of a device where layers share an array, else 0.
      sop: the token that follows a context.
    """
    shape = (shards, width)
    names = ("tokens", "positions", "pages", "offsets", "adapters")
    arrays = {name: np.zeros(shape, np.int32) for name in names}
    ranges = np.stack([np.tile(np.arange(width, dtype=np.int32), (shards, 1))] * 2, -1)
    ranges[..., 1] += 1  # padding sees itself
    used = [0] * shards
    for prompt, allocation in prompts:
        row = allocation.shard
        count, first = prefill_length(prompt), used[row]
        here = (row, slice(first, first + count))
        index = np.arange(count)
        arrays["tokens"][here] = prompt.tokens(sop)[:count]
        arrays["positions"][here] = prompt.position_ids()[:count]
        arrays["pages"][here] = np.array(allocation.pages, np.int32)[index // page_size]
        arrays["offsets"][here] = index % page_size
        arrays["adapters"][here] = prompt.adapter
        ranges[(*here, 0)] = first
        ranges[(*here, 1)] = first + np.maximum(len(prompt.context), index + 1)
        used[row] += count
    return PrefillBatch(
        tokens=arrays["tokens"],
        position_ids=arrays["positions"],
        visibility=Visibility(ranges),
        paging=Paging(arrays["pages"], arrays["offsets"], pages_a_layer=pages_a_layer),
        adapter_ids=arrays["adapters"],
    )
