"""The bus contract, on a real nats-server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgpack
import pytest

from common.bus import Bus, BusTimeoutError, NoServiceError, RemoteError, TooLargeError
from common.codec import MalformedMessageError, decode, encode
from common.messages import Admitted, Cancel, ErrorReply, InferenceRequest, Rejected, Sampling, TokenChunk
from common.nats_server import MAX_PAYLOAD_BYTES, NatsServer

Connect = Callable[[], Awaitable[Bus]]


def test_a_message_survives_the_codec() -> None:
    request = InferenceRequest(
        request_id="r", model="m", prompt_tokens=(1, 2), max_tokens=3, sampling=Sampling(temperature=0.5, seed=2**63 - 1)
    )
    assert decode(encode(request), InferenceRequest) == request


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"hello", msgpack.packb({}), msgpack.packb({"type": "cancel.9", "request_id": "r"}), msgpack.packb([1])],
)
def test_malformed_bytes_raise_one_error(data: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        decode(data, Cancel)


def test_unknown_fields_are_ignored() -> None:
    assert decode(msgpack.packb({"type": "cancel.1", "request_id": "r", "new": 1}), Cancel) == Cancel(request_id="r")


async def test_messages_of_a_subscription_arrive_in_order(bus: Bus) -> None:
    seen: list[int] = []
    done = asyncio.Event()

    async def on_chunk(chunk: TokenChunk) -> None:
        seen.append(chunk.seq)
        if chunk.seq == 99:
            done.set()

    await bus.subscribe("s", TokenChunk, on_chunk)
    for seq in range(100):
        await bus.publish("s", TokenChunk(request_id="r", seq=seq))
    await asyncio.wait_for(done.wait(), 5)
    assert seen == list(range(100))


async def test_who_has_flushed_is_heard_of_by_others(bus: Bus, connect: Connect) -> None:
    """Each time; the client's own flush lost a twentieth of them."""
    asker = await connect()

    async def on_cancel(message: Cancel) -> Cancel:
        return message

    for i in range(150):
        subscription = await bus.subscribe(f"work.{i}", Cancel, on_cancel)
        await bus.flush()
        assert await asker.request(f"work.{i}", Cancel(request_id="r"), Cancel) == Cancel(request_id="r")
        await subscription.unsubscribe()


async def test_a_queue_group_delivers_each_message_once(connect: Connect) -> None:
    counts = [0, 0]
    done = asyncio.Event()
    for i in range(2):
        worker = await connect()

        async def on_cancel(_: Cancel, i: int = i) -> None:
            counts[i] += 1
            if sum(counts) == 200:
                done.set()

        await worker.subscribe("work", Cancel, on_cancel, queue="workers")
        await worker.flush()
    sender = await connect()
    for i in range(200):
        await sender.publish("work", Cancel(request_id=str(i)))
    await asyncio.wait_for(done.wait(), 5)
    assert min(counts) > 0


async def test_request_returns_one_of_several_types(bus: Bus) -> None:
    async def on_request(request: InferenceRequest) -> Admitted | Rejected:
        if request.max_tokens > 5:
            return Rejected(reason="too_long", message="no")
        return Admitted(request_id=request.request_id, executor_id="e")

    await bus.subscribe("infer", InferenceRequest, on_request)

    async def ask(max_tokens: int) -> Admitted | Rejected:
        request = InferenceRequest(request_id="r", model="m", prompt_tokens=(1,), max_tokens=max_tokens)
        return await bus.request("infer", request, Admitted | Rejected)  # type: ignore[arg-type]

    assert await ask(1) == Admitted(request_id="r", executor_id="e")
    assert isinstance(await ask(9), Rejected)


async def test_nobody_listening_is_noticed_at_once(bus: Bus) -> None:
    with pytest.raises(NoServiceError):
        await bus.request("nowhere", Cancel(request_id="r"), Cancel)


async def test_a_silent_responder_is_a_timeout(bus: Bus) -> None:
    async def on_cancel(_: Cancel) -> None:
        return None

    await bus.subscribe("silent", Cancel, on_cancel)
    with pytest.raises(BusTimeoutError):
        await bus.request("silent", Cancel(request_id="r"), Cancel, timeout_s=0.05)


async def test_malformed_and_failing_messages_are_counted_answered_and_survived(bus: Bus) -> None:
    async def on_cancel(cancel: Cancel) -> Cancel:
        if cancel.request_id == "bad":
            raise RuntimeError("secret detail")
        return cancel

    await bus.subscribe("s", Cancel, on_cancel)
    with pytest.raises(RemoteError) as failed:
        await bus.request("s", Cancel(request_id="bad"), Cancel)
    assert failed.value.reply.status == 500
    assert "secret" not in failed.value.reply.message
    answer = await bus.client.request("s", b"garbage")
    assert decode(answer.data, ErrorReply).status == 400
    assert await bus.request("s", Cancel(request_id="good"), Cancel) == Cancel(request_id="good")
    assert bus.counters == {"failed_messages": 1, "malformed_messages": 1}


async def test_empty_messages_may_be_somebody_elses(bus: Bus) -> None:
    seen: list[Cancel] = []

    async def on_cancel(cancel: Cancel) -> Cancel:
        seen.append(cancel)
        return cancel

    await bus.subscribe("s", Cancel, on_cancel, ignores_empty=True)
    await bus.client.publish("s", b"")
    await bus.request("s", Cancel(request_id="r"), Cancel)
    assert seen == [Cancel(request_id="r")]
    assert not bus.counters


async def test_concurrent_handlers_overlap(bus: Bus) -> None:
    both = asyncio.Barrier(2)

    async def on_cancel(cancel: Cancel) -> Cancel:
        await both.wait()
        return cancel

    await bus.subscribe("s", Cancel, on_cancel, concurrent=True)
    await asyncio.wait_for(asyncio.gather(*(bus.request("s", Cancel(request_id=str(i)), Cancel) for i in range(2))), 5)


async def test_an_oversized_message_is_refused_before_sending(bus: Bus) -> None:
    with pytest.raises(TooLargeError):
        await bus.publish_raw("s", bytes(MAX_PAYLOAD_BYTES + 1))


async def test_buckets_are_created_once_and_survive_a_server_restart(nats_server: NatsServer) -> None:
    bus = await Bus.connect(nats_server.url, "test")
    store = await bus.key_value("heddle_test")
    await store.put("key", b"value")
    await (await bus.object_store("heddle_objects")).put("name", b"x" * 300_000)
    assert (await (await bus.key_value("heddle_test")).get("key")).value == b"value"
    nats_server.kill()
    nats_server.start()
    again = await Bus.connect(nats_server.url, "test")
    assert (await (await again.key_value("heddle_test")).get("key")).value == b"value"
    assert len((await (await again.object_store("heddle_objects")).get("name")).data or b"") == 300_000
    await again.drain()
    await bus.drain()
