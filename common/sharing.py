"""How the ways to share out iterations are spelled, for whoever takes the options in: among halves of the requests (cohorts),
and between inference and finetuning. Knows no iteration.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_COHORTS = 2
MAX_FREQUENCY = 1_000_000
SPELLINGS = f"token, dynamic or temporal:N with N from 1 to {MAX_FREQUENCY}"


class Sharing(NamedTuple):
    """A policy's name, and for `temporal` its inference iterations per mini-batch."""

    name: str = "token"
    frequency: int = 0


TOKEN = Sharing()


def parse_sharing(text: str) -> Sharing:
    """What the option says. Raises ValueError, which tells all that it may be."""
    if text in ("token", "dynamic"):
        return Sharing(text)
    match = re.fullmatch(r"temporal:([0-9]{1,7})", text)
    if match is None or not 1 <= int(match[1]) <= MAX_FREQUENCY:
        raise ValueError(f"must be {SPELLINGS}, not {text!r}")
    return Sharing("temporal", int(match[1]))
