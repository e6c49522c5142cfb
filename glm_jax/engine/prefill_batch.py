"""Prompts that are prefilled together, one after another in a row."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm_jax.engine.page_pool import Lease
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.step_functions import Pack
from glm_jax.model.paged_cache import Paging
from glm_jax.model.visibility import Visibility

_SMALLEST, _LEAST_STEP = 32, 16


@dataclasses.dataclass(frozen=True)
class Entry:
    """A request on its way into a slot.

    Attributes:
      ticket, request: of the engine.
      lease: the pages for all its tokens.
      end: tokens that it may come to, sop included.
    """

    ticket: int
    request: Any
    slot: int
    lease: Lease
    end: int


def widths(longest: int) -> list[int]:
    """The widths that a pack may have, so that `longest` fits: 32, 48, 64, .., 256, 288, ..,
    from 128 on eight to each doubling, so that one in twenty tokens is padding."""
    found = [_SMALLEST]
    while found[-1] < longest:
        octave = 1 << (found[-1].bit_length() - 1)
        found.append(found[-1] + max(octave // 8, _LEAST_STEP))
    return found


def pack_width(length: int) -> int:
    """The narrowest of `widths` that holds `length` tokens."""
    return widths(length)[-1]


def prefilled(prompt: Prompt) -> int:
    """Tokens that are prefilled: all but the last, which a step runs."""
    return len(prompt) - 1


def pack_prompts(
    entries: Sequence[Entry], shards: int, width: int, page_size: int, pages_a_layer: int, sop: int
) -> Pack:
    """Arrays of numpy; an entry's row is its lease's shard.

    Args:
      width: of a row, which holds all that goes there.
      pages_a_layer: of a device where layers share an array, else 0.
    """
    shape = (shards, width)
    arrays = {
        name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "pages", "offsets")
    }
    ranges = np.stack([np.tile(np.arange(width, dtype=np.int32), (shards, 1))] * 2, -1)
    ranges[..., 1] += 1  # padding sees itself
    used = [0] * shards
    for entry in entries:
        prompt, row = entry.request.prompt, entry.lease.shard
        count, first = prefilled(prompt), used[row]
        here = (row, slice(first, first + count))
        places = np.arange(count)
        arrays["tokens"][here] = prompt.tokens(sop)[:count]
        arrays["positions"][here] = prompt.position_ids()[:count]
        arrays["pages"][here] = np.array(entry.lease.pages, np.int32)[places // page_size]
        arrays["offsets"][here] = places % page_size
        ranges[(*here, 0)] = first
        ranges[(*here, 1)] = first + np.maximum(len(prompt.context), places + 1)
        used[row] += count
    return Pack(
        tokens=arrays["tokens"],
        position_ids=arrays["positions"],
        visibility=Visibility(ranges),
        paging=Paging(arrays["pages"], arrays["offsets"], pages_a_layer=pages_a_layer),
    )
