"""The NATS door: the same requests without HTTP, and the example client of the documentation as it stands."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common import subjects
from common.messages import TokenChunk
from common.nats_server import NatsServer, free_port
from tests.fakes import MODEL, SAID, write_tiny_model
from tests.gateway_stage import Connect, Stage, running_gateway, staged

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "nats_client.py"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": MODEL, "prompt": [5, 6], "max_tokens": 64}
WAIT_S = 10

Pack = Callable[[Any], bytes]
Unpack = Callable[[bytes], Any]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


async def ask(stage: Stage, body: bytes, headers: dict[str, str] | None = None) -> list[bytes]:
    """All messages up to the empty one that ends the stream."""
    client = stage.bus.client
    inbox = client.new_inbox()
    stream = await client.subscribe(inbox)
    await client.publish(subjects.GENERATE, body, reply=inbox, headers=headers)
    messages = []
    while data := (await stream.next_msg(timeout=WAIT_S)).data:
        messages.append(data)
    await stream.unsubscribe()
    return messages


def texts(chunks: list[Any]) -> str:
    """The text of completion chunks."""
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [(msgspec.msgpack.encode, msgspec.msgpack.decode), (msgspec.json.encode, msgspec.json.decode)],
    ids=["msgpack", "json"],
)
async def test_both_encodings_and_both_kinds(connect: Connect, model_dir: Path, pack: Pack, unpack: Unpack) -> None:
    async with staged(connect, model_dir) as stage:
        body = CHAT | {"stream_options": {"include_usage": True}, "seed": 3}
        *chunks, usage = [unpack(data) for data in await ask(stage, pack(body))]
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == SAID
        assert chunks[0]["object"] == "chat.completion.chunk"
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], len(stage.executor.reply))
        assert chunks[0]["id"].startswith("chatcmpl-")
        assert {chunk["id"] for chunk in [*chunks, usage]} == {chunks[0]["id"]}
        assert stage.executor.requests[0].sampling.seed == 3
        chunks = [unpack(data) for data in await ask(stage, pack(TEXT))]
        assert texts(chunks) == SAID
        assert stage.executor.requests[1].prompt_tokens == (5, 6)


async def test_headers_set_the_slo(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        await ask(stage, msgspec.json.encode(TEXT), {"X-SLO-TPOT-MS": "25"})
        assert stage.executor.requests[0].slo.tpot_ms == 25.0


WRONG: list[tuple[bytes, str]] = [
    (b"", "malformed"),
    (b"\xc1\xff", "malformed"),
    (b"  {", "malformed"),
    (b"\x05", "invalid_type"),
    (msgspec.msgpack.encode({"model": MODEL}), "missing_required_parameter"),
    (msgspec.msgpack.encode(TEXT | {"temperature": "hot"}), "invalid_type"),
    (msgspec.msgpack.encode(TEXT | {"model": "other"}), "model_not_found"),
    (msgspec.json.encode(TEXT | {"n": 99}), "integer_above_max_value"),
    (msgspec.json.encode(TEXT | {"slo_tpot_ms": 5}), "unknown_parameter"),
    (msgspec.msgpack.encode({"prompt": None}), "missing_required_parameter"),
    (msgspec.msgpack.encode({5: 6, **TEXT}), "invalid_value"),
]


async def test_wrong_requests_are_answered_and_survived(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        for body, code in WRONG:
            (answer,) = await ask(stage, body)
            unpack = msgspec.json.decode if body.strip().startswith(b"{") else msgspec.msgpack.decode
            error = unpack(answer)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == code
        assert texts([msgspec.json.decode(data) for data in await ask(stage, msgspec.json.encode(TEXT))]) == SAID


async def test_a_request_is_a_chat_or_a_completion(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        (both,) = await ask(stage, msgspec.json.encode(CHAT | TEXT))
        assert msgspec.json.decode(both)["error"]["message"] == "Give either messages or prompt, not both."
        (neither,) = await ask(stage, b"{}")
        assert all(name in msgspec.json.decode(neither)["error"]["message"] for name in ("`messages`", "`prompt`"))
        assert stage.executor.requests == []
        null = msgspec.json.encode(CHAT | {"prompt": None})
        chunks = [msgspec.json.decode(data) for data in await ask(stage, null)]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


async def test_a_request_without_reply_subject_is_counted(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        await stage.bus.client.publish(subjects.GENERATE, msgspec.json.encode(TEXT))
        await ask(stage, msgspec.json.encode(TEXT))
        assert stage.gateway.actor.vitals().counters["requests_without_reply_subject"] == 1
        assert len(stage.executor.requests) == 1


async def test_a_cancel_ends_the_stream(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 2}) as stage:
        client = stage.bus.client
        stream = await client.subscribe(inbox := client.new_inbox())
        await client.publish(subjects.GENERATE, msgspec.json.encode(TEXT | {"n": 2}), reply=inbox)
        chunk = msgspec.json.decode((await stream.next_msg(timeout=WAIT_S)).data)
        await client.publish(subjects.cancel(chunk["id"].removeprefix("cmpl-")), b"anything")
        last = chunk
        while data := (await stream.next_msg(timeout=WAIT_S)).data:
            last = msgspec.json.decode(data)
        assert last["error"]["code"] == "cancelled"
        cancelled = {await asyncio.wait_for(stage.executor.cancelled.get(), WAIT_S) for _ in range(2)}
        assert cancelled == {request.request_id for request in stage.executor.requests}
        counts = (await stage.http.get("/metrics")).text
        assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 2.0' in counts, "it is no error"
        assert not any(chunk["id"].endswith(attempt_id) for attempt_id in cancelled)


async def test_a_client_that_vanishes_ends_its_request(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 1}) as stage:
        client = stage.bus.client
        stream = await client.subscribe(inbox := client.new_inbox())
        await client.publish(subjects.GENERATE, msgspec.json.encode(TEXT), reply=inbox)
        await stream.next_msg(timeout=WAIT_S)
        await stream.unsubscribe()
        await client.flush()
        (request,) = stage.executor.requests
        await stage.bus.publish(
            subjects.stream(request.request_id),
            TokenChunk(request_id=request.request_id, seq=1, tokens=tuple(stage.executor.reply[1:2])),
        )
        assert await asyncio.wait_for(stage.executor.cancelled.get(), WAIT_S) == request.request_id
        assert stage.gateway.actor.vitals().counters["vanished_nats_clients"] >= 1
        stage.executor.resume.set()
        assert texts([msgspec.json.decode(data) for data in await ask(stage, msgspec.json.encode(TEXT))]) == SAID


async def test_a_stream_goes_on_when_its_executor_dies(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 3}) as stage:
        second = await stage.second_executor()
        asking = asyncio.create_task(ask(stage, msgspec.json.encode(TEXT)))
        await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
        await stage.executor.kill()
        chunks = [msgspec.json.decode(data) for data in await asyncio.wait_for(asking, WAIT_S)]
        assert texts(chunks) == SAID
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert [request.num_generated for request in second.requests] == [3]


async def test_a_missing_chunk_is_made_good(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"skip": 4, "num_skips": 1}) as stage:
        chunks = [msgspec.json.decode(data) for data in await ask(stage, msgspec.json.encode(TEXT))]
        assert texts(chunks) == SAID
        assert len(stage.executor.requests) == 2


async def test_a_choice_that_meets_its_stop_string_leaves_the_others_alone(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 0, "num_stalls": 2}) as stage:
        asking = asyncio.create_task(ask(stage, msgspec.json.encode(TEXT | {"n": 2, "stop": "three"})))
        await asyncio.wait_for(stage.executor.was_asked(2), WAIT_S)
        stopped, running = stage.executor.requests
        for seq, token in enumerate(stage.executor.reply):
            chunk = TokenChunk(request_id=stopped.request_id, seq=seq, tokens=(token,))
            await stage.bus.publish(subjects.stream(stopped.request_id), chunk)
        assert await asyncio.wait_for(stage.executor.cancelled.get(), WAIT_S) == stopped.request_id
        stage.executor.resume.set()
        chunks = [msgspec.json.decode(data) for data in await asyncio.wait_for(asking, WAIT_S)]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        for index in (0, 1):
            mine = [choice for choice in choices if choice["index"] == index]
            assert "".join(choice["text"] for choice in mine) == SAID.partition("three")[0]
            assert mine[-1]["finish_reason"] == "stop"
        assert await asyncio.wait_for(stage.executor.cancelled.get(), WAIT_S) == running.request_id


async def test_a_failure_in_the_middle_ends_with_an_error(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"fail_at": 2}) as stage:
        *chunks, last = [msgspec.json.decode(data) for data in await ask(stage, msgspec.json.encode(TEXT))]
        assert texts(chunks) == stage.tokenizer.decode(stage.executor.reply[:2])
        assert last["error"]["code"] == "executor_error"


async def test_several_gateways_share_the_requests(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage, running_gateway(await connect(), model_dir) as second:
        await stage.executor.beat()
        async with asyncio.timeout(WAIT_S):
            while second.actor.vitals().counters.get("requests", 0) < 1:
                await ask(stage, msgspec.json.encode(TEXT))
        counts = [gateway.actor.vitals().counters.get("requests", 0) for gateway in (stage.gateway, second)]
        assert sum(counts) == len(stage.executor.requests)


async def test_the_example_of_the_documentation(connect: Connect, model_dir: Path, nats_server: NatsServer) -> None:
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) < 20
    async with staged(connect, model_dir) as stage:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(EXAMPLE), nats_server.url, "What is a loom?", stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), 30)
        assert (process.returncode, output.decode()) == (0, SAID)
        (request,) = stage.executor.requests
        assert "What is a loom?" in stage.tokenizer.decode(request.prompt_tokens)
        assert (request.slo.tpot_ms, request.max_tokens) == (100, 64)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nats://127.0.0.1:PORT", "hello"], "Connect call failed"),
        (["nowhere:port", "hello"], "nats: invalid"),
        ([], "usage: "),
    ],
)
async def test_the_example_says_in_one_line_what_is_wrong(arguments: list[str], told: str) -> None:
    arguments = [argument.replace("PORT", str(free_port())) for argument in arguments]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLE), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, output) == (1, b"")
    (line,) = errors.decode().splitlines()
    assert told in line
