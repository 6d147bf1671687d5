"""Which of a model's tokens a drafter can say: those that are probably most frequent in answers. Pure; knows counts only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

ANSWER_WEIGHT = 3
"""A token of an answer counts so much more for the vocabulary than one of a prompt."""
RANK_WEIGHT = 40_000
"""Tokens of low number are frequent in all texts (byte-pair merges come in that order): a prior for those not seen here."""


def count_tokens(counts: Counter[int], text: Iterable[int], answers: Iterable[int]) -> None:
    """Count a text, and again what of it are answers."""
    counts.update(text)
    for token in answers:
        counts[token] += ANSWER_WEIGHT - 1


def choose_vocabulary(counts: Mapping[int, int], vocab_size: int, size: int) -> list[int]:
    """At most `size` tokens, rising."""
    ranked = sorted(range(vocab_size), key=lambda token: (-(counts.get(token, 0) + RANK_WEIGHT / (token + 2000)), token))
    return sorted(ranked[: min(size, vocab_size)])
