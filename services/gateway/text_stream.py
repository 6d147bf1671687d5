"""Tokens to text as they arrive: never half a character, never a part of a stop string. Pure; knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]

CONTEXT_TOKENS = 6
"""Prompt tokens decoded before the first output token: decoders treat the start of a text in a special way."""
MAX_HELD_TOKENS = 32
"""Bytes that are no text at all are given out as replacement characters after so many tokens."""
REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of a growing token sequence. Each token is decoded together with those of the last piece of text, because
    a token's text can depend on what is before it; text that ends within a character waits for the rest of it."""

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._before = list(prompt[-CONTEXT_TOKENS:])
        self._before_text = decode(self._before)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes; often empty within a character."""
        self._held.append(token)
        text = self._decode(self._before + self._held)
        if text.endswith(REPLACEMENT) and len(self._held) < MAX_HELD_TOKENS:
            return ""
        return self._release(text)

    def finish(self) -> str:
        """The text of what is still held; an incomplete character becomes a replacement character."""
        return self._release(self._decode(self._before + self._held)) if self._held else ""

    def _release(self, text: str) -> str:
        new = text[_common_len(self._before_text, text) :]
        if new:
            self._before, self._held = self._held, []
            self._before_text = self._decode(self._before)
        elif len(self._held) >= MAX_HELD_TOKENS:
            self._held = []  # special tokens: they have no text and change none
        return new


class StopMatcher:
    """Finds the stop string that ends first. Text that may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was found)."""
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def finish(self) -> str:
        """What was held back and is no stop string."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True)
class TextPiece:
    """New text, the number of tokens that were needed for it, and whether a stop string ended the text."""

    text: str
    num_tokens: int
    stopped: bool


class TextStream:
    """Detokenizer and stop matcher in one; its output does not depend on how the tokens were grouped.

    Text of the first `min_tokens` tokens is not searched, as in vLLM.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = (), stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._detokenizer = Detokenizer(decode, prompt)
        self._matcher = StopMatcher(stops)
        self._num_unsearched = min_tokens

    def push(self, tokens: Sequence[int]) -> TextPiece:
        """Text of the next tokens, up to a stop string."""
        shown = ""
        for number, token in enumerate(tokens, start=1):
            text, stopped = self._detokenizer.push(token), False
            if self._num_unsearched > 0:
                self._num_unsearched -= 1
            else:
                text, stopped = self._matcher.push(text)
            shown += text
            if stopped:
                return TextPiece(shown, number, True)
        return TextPiece(shown, len(tokens), False)

    def finish(self) -> TextPiece:
        """The rest, after the last token."""
        text, stopped = self._matcher.push(self._detokenizer.finish())
        return TextPiece(text if stopped else text + self._matcher.finish(), 0, stopped)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)


def _common_len(left: str, right: str) -> int:
    if right.startswith(left):
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
