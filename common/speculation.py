"""How the ways to choose draft trees are spelled, for whoever takes the option in. Knows no tree."""

from __future__ import annotations

import re
from typing import NamedTuple

MODES = ("heddle", "adaserve", "throughput", "slo", "equal", "none")
"""Modes that are a word; `chain:K` is one more."""
MAX_CHAIN = 64
"""Longest chain: the draft nodes that an executor takes from one request, as it comes."""
SPELLINGS = f"{', '.join(MODES)} or chain:K with K from 1 to {MAX_CHAIN}"


class Speculation(NamedTuple):
    """A mode's name, and for a chain its length."""

    name: str
    chain_length: int | None = None


def parse_speculation(text: str) -> Speculation:
    """What the option says. Raises ValueError, which tells all that it may be."""
    if text in MODES:
        return Speculation(text)
    match = re.fullmatch(r"chain:([0-9]{1,4})", text)
    if match is None or not 1 <= int(match[1]) <= MAX_CHAIN:
        raise ValueError(f"must be {SPELLINGS}, not {text!r}")
    return Speculation("chain", int(match[1]))
