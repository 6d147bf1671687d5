"""What a page of keys and values depends on, as a digest: tokens, adapter, salt. Knows no pages and no cache.

Digests are cryptographic: what a page holds must not be found under other tokens, whoever chooses them (CVE-2025-25183).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from hashlib import blake2b

KEY_BYTES = 8
"""What executors tell of a digest (`page_key`): a guess that hits one of thousands of pages costs an estimate, not a page."""
MAX_TOLD_PAGES = 4096
"""Pages that one executor tells of, those used last: 64k tokens, in 32 KB a beat."""


class PageDigests:
    """Digests of a sequence's full pages, each computed once: a page's digest covers its tokens and its parent's digest.

    The first page's parent stands for the adapter (`adapter_version`, 0: none) and the salt that keeps tenants apart.
    """

    def __init__(self, page_size: int, adapter_version: int, salt: str) -> None:
        self._page_size = page_size
        self._root = _digest(f"{adapter_version} {salt}".encode())
        self._digests: list[bytes] = []

    def at(self, page: int, tokens: Seq[int]) -> bytes:
        """The digest of a page that `tokens` fill; they begin with those of earlier calls."""
        for place in range(len(self._digests), page + 1):
            parent = self._digests[-1] if self._digests else self._root
            start = place * self._page_size
            self._digests.append(_digest(parent + array("q", tokens[start : start + self._page_size]).tobytes()))
        return self._digests[page]


def page_key(digest: bytes) -> bytes:
    """The page's name for those who only ask whether it is there."""
    return digest[:KEY_BYTES]


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=32).digest()
