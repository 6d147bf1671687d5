"""The NATS door: the same request bodies as HTTP's, in MessagePack or JSON; chunks go to the reply subject.

An empty message ends the stream. Anything published on the request's cancel subject ends it early: executors know the
request's attempts by ids of their own, so nobody but the client publishes there. A client that no longer listens ends it too:
chunks name a reply subject of the gateway's, to which the NATS server says when nobody has received one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import msgspec
import structlog
from nats.aio.client import NO_RESPONDERS_STATUS
from nats.aio.msg import Msg
from nats.js.api import Header

from common import subjects
from common.bus import Bus
from services.gateway import responses
from services.gateway.answer import Answer, Piece
from services.gateway.core import Core
from services.gateway.errors import ApiError, bad_request
from services.gateway.openai_api import ChatRequest, CompletionRequest, convert_generate

log = structlog.get_logger()

QUEUE_GROUP = "gateway"
Encode = Callable[[Any], bytes]


class NatsDoor:
    """Answers requests that come over NATS."""

    def __init__(self, core: Core, bus: Bus) -> None:
        self._core = core
        self._bus = bus
        self._subscription: Any = None

    async def open(self) -> None:
        """Take requests, together with the other gateways."""
        self._subscription = await self._bus.client.subscribe(subjects.GENERATE, queue=QUEUE_GROUP, cb=self._on_request)

    async def close(self) -> None:
        """Take no more; what runs goes on."""
        if self._subscription is not None:
            await self._subscription.drain()
            self._subscription = None

    async def _on_request(self, message: Msg) -> None:
        if not message.reply:
            self._core.counters["requests_without_reply_subject"] += 1
            log.warning("nats_door.no_reply_subject")
            return
        self._bus.spawn(self._serve(message))

    async def _serve(self, message: Msg) -> None:
        encode: Encode = msgspec.json.encode if is_json(message.data) else msgspec.msgpack.encode
        try:
            await self._answer(message, encode)
        except ApiError as error:
            await self._bus.publish_raw(message.reply, encode(error.body))
        await self._bus.publish_raw(message.reply, b"")

    async def _answer(self, message: Msg, encode: Encode) -> None:
        request_id = uuid4().hex
        headers = {name.lower(): value for name, value in (message.headers or {}).items()}
        request = decode_request(message.data)
        request.stream = True  # here all answers are
        plan = await self._core.plan(request, headers, request_id)
        answer = await self._core.start(plan)
        receipts = self._bus.client.new_inbox()

        async def on_receipt(receipt: Msg) -> None:
            if (receipt.headers or {}).get(Header.STATUS) == NO_RESPONDERS_STATUS:
                self._core.counters["vanished_nats_clients"] += 1
                self._core.fail(ApiError(499, "Nobody listens to the answer.", code="cancelled"), request_id)

        watched = [
            await self._bus.client.subscribe(subjects.cancel(request_id), cb=self._on_cancel),
            await self._bus.client.subscribe(receipts, cb=on_receipt),
        ]
        try:
            await self._stream(answer, message.reply, receipts, encode)
        finally:
            for subscription in watched:
                await subscription.unsubscribe()
            self._core.end(answer)

    async def _stream(self, answer: Answer, reply: str, receipts: str, encode: Encode) -> None:
        async def emit(piece: Piece) -> None:
            await self._bus.publish_raw(reply, encode(responses.chunk(answer.plan, piece)), receipts)

        await answer.run(emit)
        if answer.plan.has_usage_chunk:
            await self._bus.publish_raw(reply, encode(responses.usage_chunk(answer)))

    async def _on_cancel(self, message: Msg) -> None:
        request_id = message.subject.rpartition(".")[2]
        self._core.fail(ApiError(499, "The request was cancelled.", code="cancelled"), request_id)


def is_json(data: bytes) -> bool:
    """JSON objects begin with a brace; as MessagePack that byte is a number, not a map."""
    return data.lstrip(b" \t\r\n")[:1] == b"{"


def decode_request(data: bytes) -> ChatRequest | CompletionRequest:
    """The request. Raises ApiError 400."""
    try:
        body = msgspec.json.decode(data) if is_json(data) else msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise bad_request(f"The body is neither MessagePack nor JSON: {error}", code="malformed") from error
    return convert_generate(body)
