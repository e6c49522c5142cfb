"""Which pages of the cache are free, and how many sequences have each of the others.

A page is freed when the last sequence that has it is. Sequences that begin alike share pages, and a
page that others have too is copied before a sequence writes to it.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

PAGE_SIZE = 64  # tokens, unless settings say otherwise


@dataclasses.dataclass(frozen=True)
class PageAllocation:
    """The pages of a sequence, in order.

    Attributes:
      shard: the group of devices whose memory they are in.
      pages: their numbers within it.
    """

    shard: int
    pages: tuple[int, ...]


class PagePool:
    """Pages of each group of devices that has rows of its own. Page 0 is never allocated."""

    def __init__(self, shards: int, pages: int, page_size: int):
        """
        Args:
          pages: of each group of devices.
          page_size: tokens of a page.
        """
        self._free = [list(range(pages - 1, 0, -1)) for _ in range(shards)]
        self._counts = [[0] * pages for _ in range(shards)]  # sequences that have each page
        self._page_size = page_size

    def free_pages(self, shard: int) -> int:
        """Pages that a group of devices has for sequences."""
        return len(self._free[shard])

    def allocate(self, shard: int, tokens: int) -> PageAllocation:
        """Pages for a sequence of at most so many tokens."""
        return self.extend(PageAllocation(shard, ()), tokens)

    def missing(self, allocation: PageAllocation, tokens: int) -> int:
        """Pages that a sequence needs beside its own for so many tokens."""
        return max(0, page_count(tokens, self._page_size) - len(allocation.pages))

    def extend(self, allocation: PageAllocation, tokens: int) -> PageAllocation:
        """Return the allocation of a sequence with pages for at least so many tokens."""
        count, shard = self.missing(allocation, tokens), allocation.shard
        new = tuple(self._take(shard) for _ in range(count))
        return PageAllocation(shard, (*allocation.pages, *new))

    def fork(self, allocation: PageAllocation, count: int | None = None) -> PageAllocation:
        """Return the same pages, or the first `count` of them, for one more sequence."""
        shared = PageAllocation(allocation.shard, allocation.pages[:count])
        for page in shared.pages:
            self._counts[shared.shard][page] += 1
        return shared

    def free(self, allocation: PageAllocation) -> None:
        """End a sequence: pages that no other has can be allocated again."""
        self._drop(allocation.shard, reversed(allocation.pages))

    def make_writable(
        self, allocation: PageAllocation, position: int
    ) -> tuple[PageAllocation, tuple[int, int] | None]:
        """Return the allocation of a sequence that is about to write a token at `position`, such
        that no other sequence has that page.

        Returns:
          It, and which page is to be copied onto which first; None where none is.
        """
        shard, pages, index = allocation.shard, allocation.pages, position // self._page_size
        shared = pages[index]
        if self._counts[shard][shared] == 1:
            return allocation, None
        own = self._take(shard)
        self._drop(shard, [shared])
        changed = PageAllocation(shard, (*pages[:index], own, *pages[index + 1 :]))
        # Of a page that begins here nothing is written yet.
        return changed, (shared, own) if position % self._page_size else None

    def _take(self, shard: int) -> int:
        page = self._free[shard].pop()
        self._counts[shard][page] = 1
        return page

    def _drop(self, shard: int, pages: Iterable[int]) -> None:
        for page in pages:
            self._counts[shard][page] -= 1
            if not self._counts[shard][page]:
                self._free[shard].append(page)


def page_count(tokens: int, page_size: int = PAGE_SIZE) -> int:
    """Return the number of pages that so many tokens take."""
    return -(-tokens // page_size)


def page_table(pages: Sequence[int], size: int) -> Int[np.ndarray, " size"]:
    """Return the page table of a sequence that has these pages, int32; 0 fills it up."""
    table = np.zeros(size, np.int32)
    table[: len(pages)] = pages
    return table


def table_size(tokens: int, page_size: int = PAGE_SIZE) -> int:
    """Return the entries of a page table for so many tokens: a power of two, as kernels ask for."""
    return 1 << (page_count(tokens, page_size) - 1).bit_length()


def cache_pages(tokens: int, longest: int, shards: int, page_size: int = PAGE_SIZE) -> int:
    """Return the pages of each group of devices, page 0 included.

    Args:
      tokens: that the caches of all groups have room for.
      longest: tokens of the longest sequence, for which each group has room.
      shards: groups of devices.
    """
    return 1 + max(page_count(longest, page_size), page_count(tokens, page_size * shards))
