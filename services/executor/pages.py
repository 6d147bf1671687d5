"""Which page of the KV cache belongs to which sequences, and which is kept for later ones. Knows ints and digests only.

A full page of computed tokens can be published under a digest of all that its keys and values depend on (`prefix.py`). Other
sequences then share it, and when nobody holds it any more it stays cached until its room is needed, least recently used first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]


class OutOfPagesError(Exception):
    """Fewer pages are free than a sequence needs; nothing was allocated."""


class PageTable:
    """The pages of one sequence, in order. Published ones, which nobody writes into, come first."""

    __slots__ = ("_slots", "num_published", "num_taken", "page_size", "pages")

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: list[int] = []
        self.num_taken = 0
        """Pages taken over from the cache."""
        self.num_published = 0
        """Pages whose content will not change any more: those taken over and those published."""
        self._slots = np.empty(0, dtype=np.int64)

    def slots(self, start: int, end: int) -> Slots:
        """Cache slots of the tokens start..end, which must be allocated. A view: it costs the same for any context."""
        if (num_known := len(self._slots) // self.page_size) < len(self.pages):
            firsts = np.array(self.pages[num_known:], dtype=np.int64) * self.page_size
            self._slots = np.concatenate([self._slots, (firsts[:, None] + np.arange(self.page_size)).ravel()])
        return self._slots[start:end]

    def clear(self) -> list[int]:
        """Empty the table; returns the pages it had."""
        pages, self.pages = self.pages, []
        self.num_taken = self.num_published = 0
        self._slots = self._slots[:0]
        return pages


class PageAllocator:
    """The pages of a pool. Each is free, cached (published, held by nobody) or held by as many tables as it has references."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"the pool needs at least one page of at least one slot, got {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_allocated = 0
        """References ever handed out."""
        self.num_freed = 0
        """References ever given back."""
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_references = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._digest_of: OrderedDict[int, bytes] = OrderedDict()
        """Of the published pages, the one used longest ago first."""

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that are kept for later sequences only."""
        return len(self._cached)

    def table(self) -> PageTable:
        """An empty table for a new sequence."""
        return PageTable(self.page_size)

    def missing(self, table: PageTable, num_tokens: int) -> int:
        """Pages that the table lacks to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.page_size) - len(table.pages))

    def reserve(self, table: PageTable, num_tokens: int) -> None:
        """Grow the table until it holds `num_tokens` tokens. Raises OutOfPagesError and allocates nothing if it cannot.

        The least recently used cached pages are forgotten if too few are free.
        """
        missing = self.missing(table, num_tokens)
        if missing > self.num_free:
            raise OutOfPagesError(f"{missing} pages needed, {self.num_free} free")
        for _ in range(missing):
            page = self._free.pop() if self._free else self._evict()
            self._num_references[page] = 1
            table.pages.append(page)
        self.num_allocated += missing

    def take(self, table: PageTable, digest: bytes) -> bool:
        """Append the page published under this digest to a table whose pages are all published; False if there is none."""
        assert table.num_published == len(table.pages)
        page = self._page_of.get(digest)
        if page is None:
            return False
        self._cached.pop(page, None)
        self._digest_of.move_to_end(page)
        self._num_references[page] += 1
        self.num_allocated += 1
        table.pages.append(page)
        table.num_taken += 1
        table.num_published += 1
        return True

    def publish(self, table: PageTable, digest: bytes) -> None:
        """The table's first unpublished page is full and will not change: others may take it.

        Of pages with the same digest, computed side by side, the first is found by others; the rest stay their tables' own.
        """
        page = table.pages[table.num_published]
        table.num_published += 1
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def release(self, table: PageTable, *, is_sound: bool = True) -> None:
        """Give all pages of the table back; releasing an empty table is harmless. What is not sound is not kept for anybody.

        Its last pages are forgotten first: a page is of use to those only who find all pages before it.
        """
        pages = table.clear()
        for page in reversed(pages):
            if not is_sound:
                self._unpublish(page)
            self._num_references[page] -= 1
            if page in self._digest_of:
                self._digest_of.move_to_end(page)
            if self._num_references[page]:
                continue
            if page in self._digest_of:
                self._cached[page] = None
            else:
                self._free.append(page)
        self.num_freed += len(pages)

    def published(self, limit: int) -> list[bytes]:
        """Digests of the pages that others would find, at most that many, the one used last first."""
        return list(itertools.islice(reversed(self._digest_of.values()), limit))

    def forget_all(self) -> None:
        """Forget everything published; tables keep what they hold."""
        self._free += self._cached
        self._cached.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._unpublish(page)
        return page

    def _unpublish(self, page: int) -> None:
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
