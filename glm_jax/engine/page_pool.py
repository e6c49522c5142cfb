"""Which pages of the cache are free."""

import dataclasses

PAGE_SIZE = 64  # tokens, unless settings say otherwise


@dataclasses.dataclass(frozen=True)
class Lease:
    """Pages that a sequence has, in order.

    Attributes:
      shard: the group of devices that holds them.
      pages: their numbers within it.
    """

    shard: int
    pages: tuple[int, ...]


class PagePool:
    """Free pages of each group of devices that has rows of its own. Page 0 is never given."""

    def __init__(self, shards: int, pages: int, page_size: int):
        self._free = [list(range(pages - 1, 0, -1)) for _ in range(shards)]
        self._page_size = page_size
        self.capacity = (pages - 1) * page_size

    def can_take(self, shard: int, tokens: int) -> bool:
        """Whether a group of devices has pages for a sequence."""
        return len(self._free[shard]) >= page_count(tokens, self._page_size)

    def take(self, shard: int, tokens: int) -> Lease:
        """Pages for a sequence of at most so many tokens."""
        free = self._free[shard]
        return Lease(shard, tuple(free.pop() for _ in range(page_count(tokens, self._page_size))))

    def give_back(self, lease: Lease) -> None:
        self._free[lease.shard].extend(reversed(lease.pages))


def page_count(tokens: int, page_size: int = PAGE_SIZE) -> int:
    """Return the number of pages that so many tokens take."""
    return -(-tokens // page_size)


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
