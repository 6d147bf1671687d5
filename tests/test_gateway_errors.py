"""Refusals: every wrong request gets an OpenAI error object with the right status, and nothing reaches an executor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from common.messages import Rejected, RejectReason
from tests.fakes import MODEL, write_tiny_model
from tests.gateway_stage import Connect, Stage, staged

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": MODEL, "prompt": "hello"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object; all four keys must be there."""
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


async def post(stage: Stage, path: str, body: dict[str, Any]) -> httpx.Response:
    return await stage.http.post(path, json=body)


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": 3}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "system", "content": "x"}, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"seed": 2**64}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": 2**40}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 40_000}, "max_tokens"),
    ({"max_completion_tokens": 40_000}, "max_completion_tokens"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": {}, "stream": False}, "stream_options"),
    ({"slo": {"tpot_ms": 0}}, "slo.tpot_ms"),
    ({"slo_tpot_ms": 50}, "slo_tpot_ms"),
    ({"slo": {"tpot_ms": 50}, "slos": {}}, "slos"),
    ({"tpot_ms": 50}, "tpot_ms"),
    ({"slo": {"tpot": 5}}, "slo.tpot"),
    ({"priority": 2**40}, "priority"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_p": 1.1}, "min_p"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": True}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "x"}}, "structured_outputs.regex"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"regex": "x", "choice": ["x"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"grammar": "x" * 70_000}}, "structured_outputs.grammar"),
    ({"guided_regex": "x", "guided_json": {}}, "guided_regex"),
    ({"guided_choice": "x"}, "guided_choice"),
    ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tools"),
    ({"functions": [{}]}, "functions"),
]
BAD_TEXTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, 10**6]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"prompt": [[5] * 400] * 64, "echo": True, "logprobs": 20, "n": 8}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 0, "echo": False}, "max_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"ttft_ms": 50}, "ttft_ms"),
]


async def test_wrong_fields_are_named(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        for path, base, cases in (("/v1/chat/completions", CHAT, BAD_CHATS), ("/v1/completions", TEXT, BAD_TEXTS)):
            for wrong, param in cases:
                response = await post(stage, path, base | wrong)
                assert response.status_code == 400, (wrong, response.text)
                error = error_of(response)
                assert (error["param"], error["type"]) == (param, "invalid_request_error"), (wrong, error)
        assert stage.executor.requests == []


async def test_fields_that_change_nothing_are_accepted(connect: Connect, model_dir: Path) -> None:
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "stop": None,
        "n": None,
        "user": "me",
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "some_future_field": {"a": [1]},
        "slot_id": 3,
        "stream_options": None,
    }
    chat = {"logprobs": False, "tools": [{"type": "function"}], "tool_choice": "none", "response_format": {"type": "text"}}
    text = {"echo": False, "best_of": 1, "suffix": "", "logprobs": None}
    async with staged(connect, model_dir) as stage:
        assert (await post(stage, "/v1/chat/completions", CHAT | neutral | chat)).status_code == 200
        assert (await post(stage, "/v1/completions", TEXT | neutral | text)).status_code == 200


async def test_the_right_spelling_of_a_target_is_told(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        error = error_of(await post(stage, "/v1/chat/completions", CHAT | {"slo_tpot_ms": 50}))
        assert '"slo": {"tpot_ms": 50, ' in error["message"]
        assert error["code"] == "unknown_parameter"


async def test_an_assistants_turn_may_lack_content(connect: Connect, model_dir: Path) -> None:
    turns = [*CHAT["messages"], {"role": "assistant", "content": None}, {"role": "user", "content": "and?"}]
    async with staged(connect, model_dir) as stage:
        assert (await post(stage, "/v1/chat/completions", CHAT | {"messages": turns})).status_code == 200


async def test_bodies_that_are_no_request(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        for body in (b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000):
            response = await stage.http.post("/v1/chat/completions", content=body)
            assert response.status_code == 400, body[:20]
            error_of(response)


async def test_unknown_models_routes_and_methods(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        with pytest.raises(openai.NotFoundError) as unknown:
            await stage.openai.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        assert unknown.value.request_id
        missing = await stage.http.get("/v1/nothing")
        assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
        method = await stage.http.get("/v1/chat/completions")
        assert (method.status_code, error_of(method)["code"]) == (405, "method_not_allowed")
        assert "POST" in method.headers["allow"]


@pytest.mark.parametrize("wanted", [{"max_tokens": 600}, {"messages": [{"role": "user", "content": "one two " * 500}]}])
async def test_what_does_not_fit_the_context(connect: Connect, model_dir: Path, wanted: dict[str, Any]) -> None:
    async with staged(connect, model_dir) as stage:
        response = await post(stage, "/v1/chat/completions", CHAT | wanted)
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"
        assert stage.executor.requests == []


async def test_a_body_that_is_too_large(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, max_body_bytes=1000) as stage:
        response = await post(stage, "/v1/chat/completions", CHAT | {"user": "x" * 2000})
        assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")

        async def pieces() -> Any:
            for _ in range(20):
                yield b"x" * 100

        chunked = await stage.http.post("/v1/chat/completions", content=pieces())
        assert (chunked.status_code, error_of(chunked)["code"]) == (413, "request_too_large")


REFUSALS: list[tuple[RejectReason, int, int, str]] = [
    ("overloaded", 1500, 429, "overloaded"),
    ("no_executor", 250, 503, "no_executor"),
    ("draining", 250, 503, "draining"),
    ("unknown_model", 0, 404, "model_not_found"),
    ("too_long", 0, 400, "context_length_exceeded"),
    ("invalid", 0, 400, "invalid_request"),
    ("duplicate", 0, 500, "internal"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_admissions_refusals(connect: Connect, model_dir: Path, stream: bool) -> None:
    async with staged(connect, model_dir) as stage:
        for reason, retry_after_ms, status, code in REFUSALS:
            stage.admission.rejection = Rejected(reason=reason, message="because", retry_after_ms=retry_after_ms)
            response = await post(stage, "/v1/chat/completions", CHAT | {"stream": stream})
            assert response.status_code == status
            assert (error_of(response)["code"], error_of(response)["message"]) == (code, "because")
            headers = (response.headers.get("retry-after-ms"), response.headers.get("retry-after"))
            expected = (str(retry_after_ms), str(math.ceil(retry_after_ms / 1000))) if retry_after_ms else (None, None)
            assert headers == expected


async def test_the_client_retries_an_overload_by_itself(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        stage.admission.rejection = Rejected(reason="overloaded", message="later", retry_after_ms=50)
        with pytest.raises(openai.RateLimitError):
            await stage.openai.completions.create(model=MODEL, prompt="one")
        assert stage.gateway.actor.vitals().counters["rejected_overloaded"] == 1
        with pytest.raises(openai.RateLimitError):
            await stage.openai.with_options(max_retries=2).completions.create(model=MODEL, prompt="one")
        assert stage.gateway.actor.vitals().counters["rejected_overloaded"] == 4


async def test_an_error_of_the_executor(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"fail_at": 2}) as stage:
        response = await post(stage, "/v1/chat/completions", CHAT)
        assert (response.status_code, error_of(response)["code"]) == (500, "executor_error")
        stream = await stage.openai.completions.create(model=MODEL, prompt="one", stream=True)
        text = ""
        with pytest.raises(openai.APIError, match="The executor failed"):  # noqa: PT012 - the error comes within the loop
            async for chunk in stream:
                text += chunk.choices[0].text
        assert text == stage.tokenizer.decode(stage.executor.reply[:2])


async def test_an_api_key(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, api_key="s3cret") as stage:
        assert (await stage.openai.models.list()).data[0].id == MODEL
        for given in (b"Bearer wrong", b"Bearer s3cret2", b"Bearer", b"", b"s3cret", b"Bearer s3cre\xe9"):
            headers = {b"authorization": given}
            for path in ("/v1/models", "/metrics", "/status", "/v1/chat/completions", "/docs", "/openapi.json"):
                response = await stage.http.get(path, headers=headers)
                assert (response.status_code, error_of(response)["type"]) == (401, "authentication_error"), path
            for path in ("/health", "/live", "/ping", "/version"):
                assert (await stage.http.get(path, headers=headers)).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            await stage.openai.with_options(api_key="wrong").models.list()


async def test_a_template_that_refuses_and_a_model_without_one(connect: Connect, model_dir: Path, tmp_path: Path) -> None:
    picky = write_tiny_model(tmp_path / "picky")
    (picky / "chat_template.jinja").write_text("{{ raise_exception('no ' + messages[0].role) }}")
    async with staged(connect, picky) as stage:
        response = await post(stage, "/v1/chat/completions", CHAT)
        assert response.status_code == 400
        assert "no user" in error_of(response)["message"]
    plain = write_tiny_model(tmp_path / "plain")
    (plain / "tokenizer_config.json").unlink()
    async with staged(connect, plain) as stage:
        assert (await post(stage, "/v1/chat/completions", CHAT)).status_code == 400
        assert (await post(stage, "/v1/completions", TEXT)).status_code == 200


async def test_bad_slo_headers(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        for value in ("fast", "0", "-5", "nan", "inf", ""):
            response = await stage.http.post("/v1/chat/completions", json=CHAT, headers={"x-slo-tpot-ms": value})
            assert (response.status_code, error_of(response)["param"]) == (400, "x-slo-tpot-ms"), value
