"""Log probabilities as OpenAI's API tells them. Pure; knows tokens' bytes and dicts, not chunks of the bus or transports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.messages import Logprobs
from common.token_bytes import TokenBytes

_CONTINUING = bytes(range(0x80, 0xC0))
"""Bytes within a UTF-8 character; each character has one other byte, its first."""


@dataclass(frozen=True)
class ScoredToken:
    """One token; `offset` characters of the shown text come before it. Nothing is before a prompt's first: no logprob."""

    data: bytes
    offset: int
    logprob: float | None
    top: tuple[tuple[bytes, float], ...]
    top_ids: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """Its bytes as text, which may be a part of a character."""
        return as_text(self.data)

    def with_top(self, num_top: int) -> ScoredToken:
        """The same with fewer alternatives."""
        return replace(self, top=self.top[:num_top], top_ids=self.top_ids[:num_top])


class Scorer:
    """Turns one choice's tokens and numbers into scored tokens, in order."""

    def __init__(self, token_bytes: TokenBytes, hidden: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._hidden = hidden
        self._offset = 0

    def prompt(self, tokens: Sequence[int], text: str, parts: Iterable[Logprobs]) -> list[ScoredToken]:
        """The prompt's tokens, of which all but the first have numbers; special ones count if the echoed text shows them."""
        numbers = [number for part in parts for number in _rows(part)]
        found = []
        for place, token in enumerate(tokens):
            logprob, top = numbers[place - 1] if 0 < place <= len(numbers) else (None, ())
            is_shown = token not in self._hidden or text.startswith(as_text(self._token_bytes(token)), self._offset)
            found.append(self._scored(token, logprob, top, is_shown))
        self._offset = len(text)  # nothing of a prompt that is not echoed
        return found

    def output(self, tokens: Sequence[int], part: Logprobs | None) -> list[ScoredToken]:
        """The next output tokens; none without numbers."""
        rows = [] if part is None else _rows(part)
        return [self._scored(token, *row, token not in self._hidden) for token, row in zip(tokens, rows, strict=False)]

    def _scored(self, token: int, logprob: float | None, top: Iterable[tuple[int, float]], is_shown: bool) -> ScoredToken:
        data = self._token_bytes(token)
        offset = self._offset - (bool(data) and data[0] in _CONTINUING and self._offset > 0)
        self._offset += sum(byte not in _CONTINUING for byte in data) if is_shown else 0
        alternatives = tuple(top)
        ids = tuple(other for other, _ in alternatives)
        return ScoredToken(data, offset, logprob, tuple((self._token_bytes(other), own) for other, own in alternatives), ids)


def chat_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""
    return {
        "content": [
            _entry(token.data, token.logprob) | {"top_logprobs": [_entry(*alternative) for alternative in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """The `logprobs` of a text completion's choice; as in OpenAI's, the token itself is among its alternatives."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_alternatives(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def prompt_logprobs(
    tokens: Sequence[int], scored: Sequence[ScoredToken], num_top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: per token a map from token id, its own first; ranks are told of the most probable ones."""
    found: list[dict[str, dict[str, Any]] | None] = []
    for number, token in zip(tokens, scored, strict=True):
        ranks = {other: rank for rank, other in enumerate(token.top_ids, start=1)}
        entries = {str(number): _ranked(token.data, token.logprob, ranks.get(number))}
        for other, (data, logprob) in zip(token.top_ids[:num_top], token.top, strict=False):
            entries.setdefault(str(other), _ranked(data, logprob, ranks[other]))
        found.append(None if token.logprob is None else entries)
    return found


def _ranked(data: bytes, logprob: float | None, rank: int | None) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": as_text(data)}


def as_text(data: bytes) -> str:
    """Bytes as text; what is no whole character becomes U+FFFD."""
    return data.decode(errors="replace")


def _alternatives(token: ScoredToken) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for data, logprob in (*token.top, (token.data, token.logprob)):
        found.setdefault(as_text(data), logprob)  # of several parts of characters that read the same: the most probable
    return found


def _entry(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": as_text(data), "logprob": logprob, "bytes": list(data)}


def _rows(part: Logprobs) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """(own number, alternatives) of each token."""
    pairs = tuple(zip(part.top_tokens, part.top_logprobs, strict=False))
    return [(own, pairs[place * part.num_top : (place + 1) * part.num_top]) for place, own in enumerate(part.chosen)]
