"""The HTTP door with the official client: chat and text completions, streamed and whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessageParam

from common.chat import ChatTokenizer
from tests.fakes import MODEL, REPLY, SAID, write_tiny_model
from tests.gateway_stage import Connect, Stage, staged

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


async def events(stage: Stage, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> list[Any]:
    """The data of all events of a stream; strings that are no JSON as they are."""
    async with stage.http.stream("POST", path, json=body | {"stream": True}, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) if line.startswith("data: {") else line[6:] for line in lines]


async def test_a_chat_completion(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        answer = await stage.openai.chat.completions.create(model=MODEL, messages=MESSAGES, seed=7, temperature=0.5, top_p=0.9)
        choice = answer.choices[0]
        assert (choice.message.content, choice.message.role, choice.finish_reason) == (SAID, "assistant", "stop")
        (request,) = stage.executor.requests
        assert list(request.prompt_tokens) == stage.tokenizer.encode(PROMPT)
        assert answer.id.startswith("chatcmpl-")
        assert request.request_id not in answer.id, "executors know attempts, not requests"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(request.prompt_tokens)
        assert answer.usage.completion_tokens == len(stage.tokenizer.encode(REPLY))
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 3
        assert (request.sampling.seed, request.sampling.temperature, request.sampling.top_p) == (7, 0.5, 0.9)
        assert request.max_tokens == 512 - len(request.prompt_tokens)
        assert request.stop_token_ids == stage.tokenizer.eos_token_ids
        assert request.model == MODEL
        assert request.arrived_at == pytest.approx(answer.created, abs=2)


async def test_a_streamed_chat_with_usage(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"chunk_size": 3}) as stage:
        stream = await stage.openai.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        *with_choices, last = chunks
        assert with_choices[0].choices[0].delta.role == "assistant"
        assert with_choices[0].choices[0].delta.content
        assert all(chunk.choices[0].delta.role is None for chunk in with_choices[1:])
        assert "".join(chunk.choices[0].delta.content or "" for chunk in with_choices) == SAID
        assert [chunk.choices[0].finish_reason for chunk in with_choices] == [None] * (len(with_choices) - 1) + ["stop"]
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == len(stage.tokenizer.encode(REPLY))
        assert all(chunk.usage is None for chunk in with_choices)
        assert len({chunk.id for chunk in chunks}) == 1


CHAT_PARTS = [{"role": "user", "content": [{"type": "text", "text": "one two"}]}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "one two", "repetition_penalty": 1.0, "max_tokens": 3, "logprobs": None}),
        ("/v1/chat/completions", {"messages": CHAT_PARTS, "max_completion_tokens": 3}),
    ],
)
async def test_vllm_bench_serve_is_understood_and_understands(
    path: str, body: dict[str, Any], connect: Connect, model_dir: Path
) -> None:
    """What its client sends (vLLM 0.32): the first model by name and folder, and a chunk with choices for a token, one without
    for the usage. The token count of its random prompts is checked with /tokenize."""
    async with staged(connect, model_dir) as stage:
        card = (await stage.http.get("/v1/models")).json()["data"][0]
        assert ChatTokenizer.load(Path(card["root"])).encode("one two") == stage.tokenizer.encode("one two")
        asked = {"model": card["root"], "prompt": "one two", "add_special_tokens": False}
        assert (await stage.http.post("/tokenize", json=asked)).json()["tokens"] == stage.tokenizer.encode("one two")
        common = {"model": card["id"], "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        *chunks, usage, done = await events(stage, path, body | common | {"temperature": 0.0})
        assert len(chunks) == 3
        assert all(chunk["choices"] and not chunk.get("usage") for chunk in chunks)
        assert (usage["choices"], usage["usage"]["completion_tokens"], done) == ([], 3, "[DONE]")
        request = stage.executor.requests[0]
        assert usage["usage"]["prompt_tokens"] == len(request.prompt_tokens)
        assert (request.ignore_eos, request.max_tokens, request.sampling.temperature) == (True, 3, 0.0)


async def test_the_wire_format_of_a_stream(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        *chunks, done = await events(stage, "/v1/chat/completions", {"model": MODEL, "messages": MESSAGES})
        assert done == "[DONE]"
        assert all("usage" not in chunk for chunk in chunks)
        body = {"model": MODEL, "messages": MESSAGES, "stream_options": {"include_usage": True}}
        *chunks, _usage, _done = await events(stage, "/v1/chat/completions", body)
        assert all(chunk["usage"] is None for chunk in chunks)


async def test_a_text_completion_streamed_and_whole(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        whole = await stage.openai.completions.create(model=MODEL, prompt="one two", max_tokens=5)
        stream = await stage.openai.completions.create(model=MODEL, prompt="one two", max_tokens=5, stream=True)
        streamed = [chunk async for chunk in stream]
        expected = stage.tokenizer.decode(stage.tokenizer.encode(REPLY)[:5])
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "length")
        assert "".join(chunk.choices[0].text for chunk in streamed) == expected
        assert streamed[-1].choices[0].finish_reason == "length"
        assert {chunk.object for chunk in streamed} == {"text_completion"}
        assert list(stage.executor.requests[0].prompt_tokens) == stage.tokenizer.encode("one two", add_special_tokens=True)


async def test_every_form_of_prompt(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        prompts: list[Any] = ["one", ["one", "two"], [5, 6], [[5, 6], [7]]]
        for prompt in prompts:
            answer = await stage.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
            assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        asked = [list(request.prompt_tokens) for request in stage.executor.requests]
        one, two = stage.tokenizer.encode("one"), stage.tokenizer.encode("two")
        assert asked == [one, one, two, [5, 6], [5, 6], [7]]
        assert all(request.max_tokens == 2 for request in stage.executor.requests)


async def test_sixteen_tokens_are_the_default_of_completions(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        await stage.openai.completions.create(model=MODEL, prompt="one")
        assert stage.executor.requests[0].max_tokens == 16


async def test_several_choices_have_seeds_of_their_own(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        answer = await stage.openai.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, seed=11)
        assert [(choice.index, choice.message.content) for choice in answer.choices] == [(i, SAID) for i in range(3)]
        seeds = [request.sampling.seed for request in stage.executor.requests]
        assert len({*seeds}) == 3
        assert 11 in seeds
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(stage.tokenizer.encode(PROMPT))
        assert answer.usage.completion_tokens == 3 * len(stage.tokenizer.encode(REPLY))
        stream = await stage.openai.chat.completions.create(model=MODEL, messages=MESSAGES, n=2, stream=True)
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == [SAID, SAID]


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
async def test_a_stop_string_ends_the_answer_and_the_generation(connect: Connect, model_dir: Path, chunk_size: int) -> None:
    async with staged(connect, model_dir, fake={"chunk_size": chunk_size}) as stage:
        answer = await stage.openai.chat.completions.create(model=MODEL, messages=MESSAGES, stop=["two", "never"])
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello w\u00f6rld, one ", "stop")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(stage.tokenizer.encode("Hello w\u00f6rld, one two"))
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 3
        if chunk_size < 100:
            assert await stage.executor.cancelled.get() == stage.executor.requests[0].request_id


async def test_stop_token_ids_end_the_answer_and_are_not_shown(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        (stop_id,) = stage.tokenizer.encode("!")
        answer = await stage.openai.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body={"stop_token_ids": [stop_id], "ignore_eos": True, "top_k": 5}
        )
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (SAID.removesuffix("!"), "stop")
        (request,) = stage.executor.requests
        assert request.stop_token_ids == (stop_id,)
        assert request.ignore_eos
        assert request.sampling.top_k == 5


async def test_the_priority_reaches_the_executor(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        for path, body in (("chat/completions", {"messages": MESSAGES}), ("completions", {"prompt": "one"})):
            for priority in (-3, 0, 7):
                await stage.http.post(f"/v1/{path}", json=body | {"priority": priority})
                assert stage.executor.requests[-1].priority == priority
        await stage.http.post("/v1/completions", json={"prompt": "one"})
        assert (len(stage.executor.requests), stage.executor.requests[-1].priority) == (7, 0)


async def test_the_salt_of_the_cache_reaches_the_executor_and_the_user_does_not(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        body = {"prompt": "one", "model": MODEL, "user": "someone"}
        for fields, salt in (({}, ""), ({"cache_salt": "tenant"}, "tenant"), ({"cache_salt": None}, "")):
            await stage.http.post("/v1/completions", json=body | fields)
            assert stage.executor.requests[-1].cache_salt == salt
        assert len(stage.executor.requests) == 3
        for wrong in ("", "s" * 257, 5):
            refused = await stage.http.post("/v1/completions", json=body | {"cache_salt": wrong})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cache_salt")


async def test_ignore_eos_runs_to_the_limit(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        num = 2 * len(stage.tokenizer.encode(REPLY)) + 3
        answer = await stage.openai.completions.create(
            model=MODEL, prompt="one", max_tokens=num, extra_body={"ignore_eos": True, "stop": None}
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == num
        assert answer.choices[0].text.startswith(SAID + SAID)


async def test_content_parts_and_roles(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        body = {"model": MODEL, "messages": [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]}
        answer = await stage.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        text = stage.tokenizer.decode(stage.executor.requests[0].prompt_tokens, skip_special_tokens=False)
        assert text == "<|im_start|>system\nbe kind<|im_end|>\n" + PROMPT


SLOS: list[tuple[dict[str, Any], dict[str, str], tuple[float | None, float]]] = [
    ({}, {}, (None, 900.0)),
    ({}, {"x-slo-tpot-ms": "40", "x-slo-ttft-ms": "250.5"}, (40.0, 250.5)),
    ({}, {"x-llm-d-slo-tpot-ms": "41", "X-LLM-D-SLO-TTFT-MS": "251"}, (41.0, 251.0)),
    ({"slo": {"tpot_ms": 30}}, {"x-slo-tpot-ms": "40", "x-slo-ttft-ms": "250"}, (30.0, 250.0)),
    ({"slo": {"tpot_ms": 30, "ttft_ms": 100}}, {"x-slo-tpot-ms": "40"}, (30.0, 100.0)),
]


async def test_where_the_slo_comes_from(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, default_ttft_ms=900.0) as stage:
        for extra, headers, expected in SLOS:
            body = {"model": MODEL, "messages": MESSAGES} | extra
            answer = await stage.http.post("/v1/chat/completions", json=body, headers=headers)
            slo = stage.executor.requests[-1].slo
            assert (slo.tpot_ms, slo.ttft_ms) == expected
            measured = answer.json()["usage"]["slo"]
            assert (measured["target_tpot_ms"], measured["target_ttft_ms"]) == expected
            assert measured["tpot_ms"] > 0
            assert (measured["verify_steps"], measured["drafted_tokens"], measured["accepted_tokens"]) == (4, 8, 5)


async def test_the_verdict_on_the_slo(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        for slo, expected in (({}, None), ({"ttft_ms": 60_000}, True), ({"ttft_ms": 60_000, "tpot_ms": 0.00001}, False)):
            body = {"model": MODEL, "messages": MESSAGES, "slo": slo}
            answer = await stage.http.post("/v1/chat/completions", json=body)
            assert answer.json()["usage"]["slo"]["attained"] is expected


@pytest.mark.parametrize("attainable", [True, False])
async def test_what_admission_expected_of_the_slo(connect: Connect, model_dir: Path, attainable: bool) -> None:
    async with staged(connect, model_dir, fake={"attainable": attainable}) as stage:
        for slo, expected in (({}, None), ({"tpot_ms": 60_000}, attainable)):
            body = {"model": MODEL, "messages": MESSAGES, "slo": slo, "stream_options": {"include_usage": True}}
            *_, usage, _done = await events(stage, "/v1/chat/completions", body)
            assert usage["usage"]["slo"]["attainable"] is expected


async def test_request_ids_are_echoed_or_minted(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        assert (await stage.http.get("/live", headers={"x-request-id": "mine"})).headers["x-request-id"] == "mine"
        minted = [(await stage.http.get("/live")).headers["x-request-id"] for _ in range(2)]
        assert len({*minted}) == 2


async def test_tokenize_and_detokenize(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        told = (await stage.http.post("/tokenize", json={"model": MODEL, "prompt": "one two"})).json()
        tokens = stage.tokenizer.encode("one two")
        assert told == {"count": len(tokens), "max_model_len": 512, "tokens": tokens, "token_strs": None}
        back = await stage.http.post("/detokenize", json={"model": MODEL, "tokens": told["tokens"]})
        assert back.json() == {"prompt": "one two"}
        told = (await stage.http.post("/tokenize", json={"messages": MESSAGES})).json()
        assert told["tokens"] == stage.tokenizer.encode(PROMPT)
        long = "one two three " * 2000
        assert (await stage.http.post("/tokenize", json={"prompt": long})).json()["tokens"] == stage.tokenizer.encode(long)


async def test_the_documentation_shows_the_requests(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        document = (await stage.http.get("/openapi.json")).json()
        chat = document["paths"]["/v1/chat/completions"]["post"]
        assert chat["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
        fields = document["components"]["schemas"]["ChatRequest"]
        assert "messages" in fields["required"]
        assert "Lower values are prefilled earlier." in str(fields["properties"]["priority"])
        assert (await stage.http.get("/docs")).status_code == 200
