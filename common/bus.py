"""The bus: typed messages over NATS. Knows connections, replies and errors, not what the messages mean."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import nats
import structlog
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import MaxPayloadError, NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext
from nats.js.api import KeyValueConfig, ObjectStoreConfig, StorageType
from nats.js.errors import BucketNotFoundError, NotFoundError
from nats.js.kv import KeyValue
from nats.js.object_store import ObjectStore

from common.codec import MalformedMessageError, decode, encode
from common.messages import ErrorReply
from common.telemetry import Repetition

T = TypeVar("T")
Handler = Callable[[T], Awaitable[Any]]

log = structlog.get_logger()
MAX_KINDS_OF_ERRORS = 100
"""Of which is remembered how often they came, so that they are told ever more seldom."""


class BusError(Exception):
    """A request was not answered as expected."""


class NoServiceError(BusError):
    """Nobody listens on the subject."""


class BusTimeoutError(BusError):
    """No answer in time: the responder may have died."""


class TooLargeError(BusError):
    """The message is over the server's max_payload; bulk belongs in the object store."""


class RemoteError(BusError):
    """The responder answered with a typed error."""

    def __init__(self, reply: ErrorReply) -> None:
        super().__init__(reply.message)
        self.reply = reply


class Bus:
    """One connection. `counters` holds malformed and failed messages, for heartbeats and metrics.

    The functions in `on_reconnect` are called when the connection was lost and is back: messages may be missing. They return
    at once and do not raise.
    """

    def __init__(self, client: NatsClient) -> None:
        self.client = client
        self.js: JetStreamContext = client.jetstream(timeout=10)
        self.counters: Counter[str] = Counter()
        self.on_reconnect: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def connect(cls, url: str, name: str) -> Bus:
        """Connect, waiting for a server that is not there yet; reconnects for ever, and tells errors ever more seldom.

        A url like nats://user:password@host:4222 or nats://token@host:4222 carries credentials.
        """

        errors: defaultdict[tuple[type[Exception], str], Repetition] = defaultdict(Repetition)

        async def on_error(error: Exception) -> None:
            if len(errors) >= MAX_KINDS_OF_ERRORS:
                errors.clear()
            repetition = errors[type(error), str(error)]
            if repetition.is_due(time.monotonic()):
                hidden = {"num_more": repetition.num_hidden} if repetition.num_hidden else {}
                log.warning("bus.error", error=str(error) or type(error).__name__, **hidden)
                repetition.num_hidden = 0

        listeners: list[Callable[[], None]] = []

        async def on_reconnect() -> None:
            errors.clear()
            log.info("bus.reconnected")
            for listener in listeners:
                listener()

        client = await nats.connect(
            url,
            name=name,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.25,
            error_cb=on_error,
            reconnected_cb=on_reconnect,
        )
        errors.clear()
        bus = cls(client)
        bus.on_reconnect = listeners
        return bus

    @property
    def max_payload(self) -> int:
        """Bytes that one message may have."""
        return self.client.max_payload

    async def publish(self, subject: str, message: Any) -> None:
        """Send and forget. Raises TooLargeError over the server's limit."""
        await self.publish_raw(subject, encode(message))

    async def publish_raw(self, subject: str, data: bytes, reply: str = "") -> None:
        """Send bytes that are already encoded; `reply` is where an answer, or the server's word that nobody listens, goes."""
        try:
            await self.client.publish(subject, data, reply)
        except MaxPayloadError as error:
            raise TooLargeError(f"{subject}: {len(data)} bytes, the limit is {self.max_payload}") from error

    async def request(self, subject: str, message: Any, expected: type[T], timeout_s: float = 5.0) -> T:
        """Send and await one reply of the expected type (a type or a union).

        Raises NoServiceError, BusTimeoutError, TooLargeError, RemoteError or MalformedMessageError.
        """
        data = encode(message)
        try:
            answer = await self.client.request(subject, data, timeout=timeout_s)
        except NoRespondersError as error:
            raise NoServiceError(f"nobody answers on {subject}") from error
        except NatsTimeoutError as error:
            raise BusTimeoutError(f"no answer on {subject} within {timeout_s} s") from error
        except MaxPayloadError as error:
            raise TooLargeError(f"{subject}: {len(data)} bytes, the limit is {self.max_payload}") from error
        either: Any = expected | ErrorReply
        reply = decode(answer.data, either)
        if isinstance(reply, ErrorReply):
            raise RemoteError(reply)
        return cast(T, reply)

    async def subscribe(
        self,
        subject: str,
        expected: type[T],
        handler: Handler[T],
        *,
        queue: str = "",
        concurrent: bool = False,
        ignores_empty: bool = False,
    ) -> Subscription:
        """Call `handler` for each message of the expected type (a type or a union); what it returns is the reply.

        Handlers of one subscription run one after another, in order, unless `concurrent`: then each has a task of its own.
        Malformed messages are counted and answered with ErrorReply 400, failures of the handler with 500; neither is fatal.
        With `ignores_empty` messages without a body are for somebody else.
        """

        async def on_message(raw: Msg) -> None:
            if ignores_empty and not raw.data:
                return
            if concurrent:
                self.spawn(self._handle(raw, expected, handler))
            else:
                await self._handle(raw, expected, handler)

        return await self.client.subscribe(subject, queue=queue, cb=on_message)

    async def flush(self) -> None:
        """Returns when the server knows all subscriptions made and has all messages sent before: others may rely on them.

        Two round trips: the client's first ping overtakes what still waits in its buffer (5% of subscriptions were unknown to a
        peer that asked at once), and the second follows it.
        """
        for _ in range(2):
            await self.client.flush()

    def spawn(self, work: Any) -> None:
        """Run a coroutine as a task that the bus keeps until it ends; drain() waits for it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def key_value(self, bucket: str, history: int = 1) -> KeyValue:
        """The KV bucket, created on first use; file storage."""
        try:
            return await self.js.key_value(bucket)
        except (BucketNotFoundError, NotFoundError):
            return await self.js.create_key_value(KeyValueConfig(bucket=bucket, history=history, storage=StorageType.FILE))

    async def object_store(self, bucket: str) -> ObjectStore:
        """The object store, created on first use; file storage."""
        try:
            return await self.js.object_store(bucket)
        except (BucketNotFoundError, NotFoundError):
            return await self.js.create_object_store(bucket, config=ObjectStoreConfig(storage=StorageType.FILE))

    async def drain(self) -> None:
        """Finish running handlers, flush and close."""
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.client.is_connected:
            await self.client.drain()
        else:
            await self.client.close()

    async def _handle(self, raw: Msg, expected: type[T], handler: Handler[T]) -> None:
        try:
            message = decode(raw.data, expected)
        except MalformedMessageError as error:
            self.counters["malformed_messages"] += 1
            log.warning("bus.malformed", subject=raw.subject, error=str(error))
            await self._reply(raw, ErrorReply(status=400, message=f"malformed message: {error}", code="malformed"))
            return
        try:
            reply = await handler(message)
        except Exception:  # the actor loop: one failing message must not stop the next
            self.counters["failed_messages"] += 1
            log.exception("bus.handler_failed", subject=raw.subject, request_id=getattr(message, "request_id", None))
            await self._reply(raw, ErrorReply(status=500, message="internal error", code="internal"))
            return
        if reply is not None:
            await self._reply(raw, reply)

    async def _reply(self, raw: Msg, message: Any) -> None:
        if raw.reply:
            await self.publish(raw.reply, message)
