"""Which pages of the cache are free."""

import dataclasses


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
        return len(self._free[shard]) >= self._count(tokens)

    def take(self, shard: int, tokens: int) -> Lease:
        """Pages for a sequence of at most so many tokens."""
        free = self._free[shard]
        return Lease(shard, tuple(free.pop() for _ in range(self._count(tokens))))

    def give_back(self, lease: Lease) -> None:
        self._free[lease.shard].extend(reversed(lease.pages))

    def _count(self, tokens: int) -> int:
        return -(-tokens // self._page_size)
