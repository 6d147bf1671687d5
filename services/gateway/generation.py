"""The tokens of one request, over as many executors as it takes. Knows token ids and chunks, not text or HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from uuid import uuid4

import msgspec
import structlog
from nats.aio.subscription import Subscription

from common import subjects
from common.messages import FinishReason, InferenceRequest, Logprobs, TokenChunk, Usage
from services.gateway.admission_client import AdmissionClient
from services.gateway.errors import ApiError
from services.gateway.executor_watch import ExecutorWatch

log = structlog.get_logger()

RETRY_PAUSE_S = 0.25
_GONE = frozenset({"no_admission", "admission_timeout", "no_executor", "draining"})
"""Refusals because a service died or stops: soon another one takes its place."""


@dataclass(frozen=True)
class Tokens:
    """What one chunk brought; the last one of a request has a finish reason."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: Logprobs | None = None


class Lost:
    """Of this attempt no more chunks can be relied on to come."""


class Generations:
    """Opens token streams. `counters` says how many moved to another executor."""

    def __init__(
        self,
        admission: AdmissionClient,
        watch: ExecutorWatch,
        *,
        gateway_id: str,
        open_wait_s: float,
        migration_limit: int,
        migration_wait_s: float,
    ) -> None:
        self.admission = admission
        self.watch = watch
        self.gateway_id = gateway_id
        self.open_wait_s = open_wait_s
        self.migration_limit = migration_limit
        self.migration_wait_s = migration_wait_s
        self.counters: Counter[str] = Counter()

    def stream(self, request: InferenceRequest) -> TokenStream:
        """A stream that is not open yet."""
        return TokenStream(self, request)


class TokenStream:
    """The tokens of one request, each exactly once and in order.

    When its executor dies or a chunk is missing, the request is sent again with prompt + generated tokens as its prompt.
    `max_tokens` counts all output, the `num_generated` tokens at the prompt's end included, so it stays as it is. Each attempt
    has an id of its own, the first one too: late chunks of an old attempt cannot mix in, and on the cancel subject of the
    request's own id there are its client's cancels only.
    """

    def __init__(self, generations: Generations, request: InferenceRequest) -> None:
        self.request = request
        self.executor_id = ""
        self.admitted_at = 0.0
        self.attainable = True
        """Whether its targets seemed attainable when it was first admitted; a move's lost time is nothing to foresee."""
        self.generated: list[int] = []
        self.prompt_logprobs: list[Logprobs] = []
        """Complete when the first tokens are received."""
        self._owner = generations
        self._bus = generations.admission.bus
        self._inbox: asyncio.Queue[TokenChunk | Lost] = asyncio.Queue()
        self._attempt_id = ""
        self._subscription: Subscription | None = None
        self._next_seq = 0
        self._num_migrations = 0
        self._is_open = False
        self._failure: ApiError | None = None

    async def open(self) -> None:
        """Have the request admitted. Raises ApiError when it is refused."""
        self._is_open = True
        self._owner.watch.add(self)
        await self._send_until(time.monotonic() + self._owner.open_wait_s, _GONE)

    async def receive(self) -> Tokens:
        """The next tokens. After those with a finish reason there are none. Raises ApiError when the request failed."""
        while True:
            item = await self._next_item()
            if isinstance(item, Lost):
                tokens = await self._migrate("its executor is lost")
            elif item.seq != self._next_seq:
                tokens = await self._migrate("a chunk is missing")
            elif item.finish_reason in ("cancelled", "error") and not self._is_executor_ready():
                tokens = await self._migrate("its executor stops")
            elif item.finish_reason == "cancelled" and item.error:
                tokens = await self._migrate(item.error)  # this gateway was silent for too long, but lives
            else:
                tokens = self._accept(item)
            if tokens is not None:
                return tokens

    def close(self) -> None:
        """Take no more tokens; an executor that still works on the request is told to stop. May be called twice."""
        if self._is_open:
            self._owner.admission.cancel(self._attempt_id)
            self._settle()

    def lose_executor(self) -> None:
        """The executor is dead, or the bus was away: what has not arrived will not come."""
        self._inbox.put_nowait(Lost())

    def fail(self, error: ApiError) -> None:
        """Have the receiver raise this error, and stop the executor."""
        self._failure = error
        self._inbox.put_nowait(Lost())

    async def _next_item(self) -> TokenChunk | Lost:
        item = Lost() if self._failure else await self._inbox.get()
        if self._failure is not None:
            self.close()
            raise self._failure
        return item

    def _accept(self, chunk: TokenChunk) -> Tokens | None:
        self._next_seq += 1
        self.generated += chunk.tokens
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs.append(chunk.prompt_logprobs)
        if not chunk.tokens and chunk.finish_reason is None:
            return None
        if chunk.finish_reason is not None:
            self._settle()
        if chunk.finish_reason == "error":
            raise ApiError(500, chunk.error or "The executor failed.", code="executor_error")
        if chunk.finish_reason == "cancelled":
            raise ApiError(499, "The request was cancelled.", code="cancelled")
        return Tokens(chunk.tokens, chunk.finish_reason, chunk.usage, chunk.logprobs)

    async def _migrate(self, why: str) -> Tokens | None:
        ids = {"request_id": self.request.request_id, "attempt_id": self._attempt_id}
        log.warning("request.migrates", why=why, executor=self.executor_id, **ids)
        abandoned = self._attempt_id
        self._owner.admission.cancel(abandoned)
        self._stop_listening()
        self.executor_id = ""
        if (finish_reason := self._finish_reason_so_far()) is not None:
            self._settle()
            return Tokens((), finish_reason)
        self._num_migrations += 1
        if self._num_migrations > self._owner.migration_limit:
            self._settle()
            raise ApiError(502, f"The request could not be continued: {why}.", code="executor_lost")
        self._owner.counters["migrated_requests"] += 1
        await self._send_until(time.monotonic() + self._owner.migration_wait_s, _GONE | {"overloaded"})
        self._owner.admission.cancel(abandoned)  # again: after a restart of the bus the executor may have missed the first
        return None

    def _is_executor_ready(self) -> bool:
        return self._owner.watch.is_ready(self.executor_id, time.monotonic())

    def _finish_reason_so_far(self) -> FinishReason | None:
        """Why nothing is missing although the last chunk did not arrive."""
        if self.generated and self.generated[-1] in self.request.stop_token_ids:
            return "stop"
        return "length" if len(self.generated) >= self.request.max_tokens else None

    async def _send_until(self, deadline: float, passing: Set[str]) -> None:
        """Send until admitted, each time under another id; errors with a passing code are waited out until the deadline."""
        while True:
            try:
                return await self._send(uuid4().hex)
            except ApiError as error:
                if self._failure is not None or error.code not in passing or time.monotonic() >= deadline:
                    self._settle()
                    raise self._failure or error from None
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _send(self, attempt_id: str) -> None:
        log.info("request.sent", request_id=self.request.request_id, attempt_id=attempt_id)
        await self._listen(attempt_id)
        request = msgspec.structs.replace(
            self.request,
            request_id=attempt_id,
            gateway_id=self._owner.gateway_id,
            prompt_tokens=self.request.prompt_tokens + tuple(self.generated),
            num_generated=self.request.num_generated + len(self.generated),
            prompt_logprobs=None if self.generated else self.request.prompt_logprobs,
        )
        if not self.generated:
            self.prompt_logprobs.clear()  # all of them come again
        admitted = await self._owner.admission.ask(request)
        if not self.admitted_at:
            self.attainable = admitted.attainable
        self.admitted_at = time.monotonic()
        self.executor_id = admitted.executor_id

    async def _listen(self, attempt_id: str) -> None:
        self._stop_listening()
        inbox: asyncio.Queue[TokenChunk | Lost] = asyncio.Queue()

        async def on_chunk(chunk: TokenChunk) -> None:
            inbox.put_nowait(chunk)

        self._attempt_id, self._next_seq, self._inbox = attempt_id, 0, inbox
        self._subscription = await self._bus.subscribe(subjects.stream(attempt_id), TokenChunk, on_chunk)

    def _stop_listening(self) -> None:
        if self._subscription is not None:
            self._bus.spawn(self._subscription.unsubscribe())
            self._subscription = None

    def _settle(self) -> None:
        """Nothing more will come."""
        self._is_open = False
        self._stop_listening()
        self._owner.watch.release(self)
