"""One client request as it runs: its choices, their text and their timing. Knows pieces of text, not JSON or HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from common.chat import ChatTokenizer
from common.messages import Slo, Usage
from services.gateway.errors import ApiError
from services.gateway.generation import Generations, Tokens, TokenStream
from services.gateway.logprobs import ScoredToken, Scorer
from services.gateway.plan import Plan
from services.gateway.slo import attained
from services.gateway.text_stream import TextStream

MAX_PIECE_TOKENS = 256
"""Tokens with log probabilities in one piece: each takes some 2 KB as JSON, and a piece is one message of the bus."""


@dataclass(frozen=True)
class Piece:
    """New text of one choice; the choice's last piece has a finish reason. `scored` is None if nobody asked."""

    index: int
    text: str
    finish_reason: str | None
    is_first: bool
    scored: tuple[ScoredToken, ...] | None = None


def split(piece: Piece) -> Iterator[Piece]:
    """The piece, or several if it has many scored tokens: the first one has its text, the last one its finish reason."""
    scored = piece.scored or ()
    num_pieces = max(1, -(-len(scored) // MAX_PIECE_TOKENS))
    for number in range(num_pieces):
        yield Piece(
            piece.index,
            piece.text if number == 0 else "",
            piece.finish_reason if number == num_pieces - 1 else None,
            piece.is_first and number == 0,
            None if piece.scored is None else scored[number * MAX_PIECE_TOKENS : (number + 1) * MAX_PIECE_TOKENS],
        )


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    last = pieces[-1]
    scored = None if last.scored is None else tuple(token for piece in pieces for token in piece.scored or ())
    return Piece(last.index, "".join(piece.text for piece in pieces), last.finish_reason, True, scored)


Emit = Callable[[Piece], Awaitable[None]]
OnTokens = Callable[[str, int, float | None], None]
"""Called with model, number of new tokens and the seconds since the choice's last ones (None: its first)."""


class Choice:
    """The text of one token stream, and when its tokens came (seconds of the monotonic clock)."""

    def __init__(self, index: int, stream: TokenStream, plan: Plan, tokenizer: ChatTokenizer) -> None:
        request = stream.request
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.first_at: float | None = None
        self.last_at: float | None = None
        self.stream = stream
        self.scored_prompt: list[ScoredToken] = []
        self._num_first = 0
        self._text = TextStream(tokenizer.decode, request.prompt_tokens, plan.stops, request.sampling.min_tokens)
        self._scorer = Scorer(tokenizer.token_bytes, tokenizer.special_ids)
        self._echo = plan.echoes[index // plan.num_samples] if plan.echoes else ""
        self._plan = plan

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first ones; None without a second chunk."""
        num_later = self.num_tokens - self._num_first
        if self.first_at is None or self.last_at is None or num_later <= 0:
            return None
        return (self.last_at - self.first_at) * 1000 / num_later

    async def next_piece(self, on_tokens: OnTokens) -> Piece:
        """Wait for tokens and turn them into text. Raises ApiError when the stream failed."""
        received, request = await self.stream.receive(), self.stream.request
        if self._plan.hides_output:
            received = Tokens((), received.finish_reason, received.usage)
        is_first = self.first_at is None
        self.usage = received.usage or self.usage
        shown = received.tokens
        if received.finish_reason == "stop" and shown and shown[-1] in self._plan.hidden_tokens:
            shown = shown[:-1]
        piece = self._text.push(shown)
        text, stopped = piece.text, piece.stopped
        num_new = piece.num_tokens if stopped else len(received.tokens)
        if received.finish_reason is not None and not stopped:
            rest = self._text.finish()
            text, stopped = text + rest.text, rest.stopped
        if is_first and request.prompt_logprobs is not None:
            # In a thread: 8192 tokens with 20 alternatives take 0.4 s, which other requests' tokens need not wait for.
            self.scored_prompt = await asyncio.to_thread(
                self._scorer.prompt, request.prompt_tokens, self._echo, self.stream.prompt_logprobs
            )
        echo, scored = self._echo, self._scored(received, num_new, is_first)
        self._echo = ""
        self._stamp(num_new, time.monotonic(), on_tokens)
        self.finish_reason = "stop" if stopped else received.finish_reason
        if stopped:
            self.stream.close()
        return Piece(self.index, echo + text, self.finish_reason, is_first, scored)

    def _scored(self, received: Tokens, num_new: int, is_first: bool) -> tuple[ScoredToken, ...] | None:
        num_top = self.stream.request.logprobs
        if num_top is None:
            return None
        echoed = [token.with_top(num_top) for token in self.scored_prompt] if is_first and self._plan.echoes else []
        return tuple(echoed + self._scorer.output(received.tokens[:num_new], received.logprobs))

    def _stamp(self, num_new: int, now: float, on_tokens: OnTokens) -> None:
        self.num_tokens += num_new
        if num_new == 0:
            return
        if self.last_at is None:
            self.first_at, self._num_first = now, num_new
        on_tokens(self.stream.request.model, num_new, None if self.last_at is None else now - self.last_at)
        self.last_at = now


class Answer:
    """All choices of one request. Close it whatever happens; `arrived_at` and `deadline` are of the monotonic clock."""

    def __init__(
        self,
        plan: Plan,
        generations: Generations,
        tokenizer: ChatTokenizer,
        *,
        arrived_at: float,
        deadline: float,
        on_tokens: OnTokens,
    ) -> None:
        self.plan = plan
        self.arrived_at = arrived_at
        self.error: ApiError | None = None
        self.choices = [
            Choice(index, generations.stream(request), plan, tokenizer) for index, request in enumerate(plan.requests)
        ]
        self._deadline = deadline
        self._on_tokens = on_tokens

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token of the slowest choice; None before that."""
        firsts = [choice.first_at for choice in self.choices]
        return None if None in firsts else (max(first for first in firsts if first is not None) - self.arrived_at) * 1000

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token of the slowest choice."""
        return max((choice.tpot_ms for choice in self.choices if choice.tpot_ms is not None), default=None)

    @property
    def is_attained(self) -> bool | None:
        """Whether all targets were met; None without targets."""
        return attained(self.plan.slo, self.ttft_ms, self.tpot_ms)

    @property
    def is_attainable(self) -> bool | None:
        """Whether admission expected all targets to be met; None without targets."""
        return None if self.plan.slo == Slo() else all(choice.stream.attainable for choice in self.choices)

    async def open(self) -> None:
        """Have all choices admitted. Raises ApiError; then nothing runs."""
        await self._together([choice.stream.open() for choice in self.choices])

    async def run(self, emit: Emit) -> None:
        """Emit the pieces of all choices as they come, until all have finished. Raises ApiError when one failed."""
        await self._together([self._run_choice(choice, emit) for choice in self.choices])

    def close(self) -> int:
        """Stop what still runs; says how many choices that were."""
        unfinished = [choice for choice in self.choices if choice.finish_reason is None]
        for choice in unfinished:
            choice.stream.close()
        return len(unfinished)

    async def _run_choice(self, choice: Choice, emit: Emit) -> None:
        while choice.finish_reason is None:
            piece = await choice.next_piece(self._on_tokens)
            if piece.text or piece.is_first or piece.finish_reason or piece.scored:
                for part in split(piece):
                    await emit(part)

    async def _together(self, work: Sequence[Coroutine[Any, Any, None]]) -> None:
        remaining_s = self._deadline - time.monotonic()
        try:
            async with asyncio.timeout(remaining_s), asyncio.TaskGroup() as tasks:
                for item in work:
                    tasks.create_task(item)
        except TimeoutError as error:
            self.error = ApiError(504, "The request took too long and was cancelled.", code="timeout")
            raise self.error from error
        except BaseExceptionGroup as group:
            if (first := _first_api_error(group)) is None:
                raise
            self.error = first
            raise first from group


def _first_api_error(group: BaseExceptionGroup[BaseException]) -> ApiError | None:
    """The first ApiError, if the group holds nothing worse."""
    found, worse = group.split(ApiError)
    if found is None or worse is not None:
        return None
    inner: BaseException = found
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    assert isinstance(inner, ApiError)
    return inner
