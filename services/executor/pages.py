"""Which page of the KV cache belongs to which sequence. Knows ints only."""

from __future__ import annotations


class OutOfPagesError(Exception):
    """Fewer pages are free than a sequence needs; nothing was allocated."""


class PageTable:
    """The pages of one sequence, in order. Token i lives in slot `slot(i)`."""

    __slots__ = ("page_size", "pages")

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: list[int] = []

    def slots(self, start: int, end: int) -> list[int]:
        """Cache slots of the tokens start..end, which must be allocated."""
        size = self.page_size
        return [self.pages[i // size] * size + i % size for i in range(start, end)]


class PageAllocator:
    """Free pages of a pool. Every page is either free or in exactly one table."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"the pool needs at least one page of at least one slot, got {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_allocated = 0
        """Pages ever handed out."""
        self.num_freed = 0
        """Pages ever given back."""
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    def table(self) -> PageTable:
        """An empty table for a new sequence."""
        return PageTable(self.page_size)

    def missing(self, table: PageTable, num_tokens: int) -> int:
        """Pages that the table lacks to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.page_size) - len(table.pages))

    def reserve(self, table: PageTable, num_tokens: int) -> None:
        """Grow the table until it holds `num_tokens` tokens. Raises OutOfPagesError and allocates nothing if it cannot."""
        missing = self.missing(table, num_tokens)
        if missing > len(self._free):
            raise OutOfPagesError(f"{missing} pages needed, {len(self._free)} free")
        table.pages += [self._free.pop() for _ in range(missing)]
        self.num_allocated += missing

    def release(self, table: PageTable) -> None:
        """Give all pages of the table back; releasing an empty table is harmless."""
        self.num_freed += len(table.pages)
        self._free += table.pages
        table.pages = []
