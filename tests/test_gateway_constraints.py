"""The words of OpenAI and vLLM for constrained output, over HTTP and NATS, and what becomes of an executor's refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec
import openai
import pytest
from pydantic import BaseModel

from common import subjects
from common.messages import MAX_CONSTRAINT_CHARS, Constraint, Rejected
from services.gateway.constraints import constraint_of
from services.gateway.errors import ApiError
from services.gateway.openai_api import ChatRequest, CompletionRequest, convert
from tests.fakes import EOS, MODEL, write_tiny_model
from tests.gateway_stage import Connect, staged

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
AS_SCHEMA = Constraint(kind="json_schema", text=msgspec.json.encode(SCHEMA).decode())
ASKED: list[tuple[dict[str, Any], Constraint | None]] = [
    ({}, None),
    ({"response_format": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, Constraint(kind="json_object")),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}}, AS_SCHEMA),
    ({"structured_outputs": {"json": SCHEMA}}, AS_SCHEMA),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Constraint(kind="json_schema", text=json.dumps(SCHEMA))),
    ({"structured_outputs": {"regex": "a+", "json": None}}, Constraint(kind="regex", text="a+")),
    ({"structured_outputs": {"choice": ["yes", 'n"o']}}, Constraint(kind="choice", text='["yes","n\\"o"]')),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, Constraint(kind="grammar", text='start: "a"')),
    ({"structured_outputs": {"json_object": True}}, Constraint(kind="json_object")),
    ({"guided_json": SCHEMA}, AS_SCHEMA),
    ({"guided_regex": "a+"}, Constraint(kind="regex", text="a+")),
    ({"guided_choice": ["a"]}, Constraint(kind="choice", text='["a"]')),
    ({"guided_grammar": 'root ::= "a"', "response_format": {"type": "text"}}, Constraint(kind="grammar", text='root ::= "a"')),
]


class Loom(BaseModel):
    name: str
    kind: Literal["hand", "power"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("fields", "expected"), ASKED)
def test_what_is_asked_for(fields: dict[str, Any], expected: Constraint | None) -> None:
    chat = convert({"messages": [{"role": "user", "content": "x"}]} | fields, ChatRequest)
    assert constraint_of(chat) == constraint_of(convert({"prompt": "x"} | fields, CompletionRequest)) == expected


def test_what_json_cannot_hold_is_refused() -> None:
    nested: Any = {}
    for _ in range(100_000):
        nested = {"items": nested}
    for schema in (nested, {"const": b"\xff" * 3, "enum": [msgspec.msgpack.Ext(1, b"")]}):
        with pytest.raises(ApiError) as wrong:
            constraint_of(CompletionRequest(prompt="x", guided_json=schema))
        assert (wrong.value.status, wrong.value.param) == (400, "guided_json")
    with pytest.raises(ApiError, match="at most"):
        constraint_of(CompletionRequest(prompt="x", guided_regex="x" * (MAX_CONSTRAINT_CHARS + 1)))


async def test_pydantic_models_over_http(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, '{"name": "Jacquard", "kind": "power"}' + EOS) as stage:
        answer = await stage.openai.chat.completions.parse(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], response_format=Loom, n=2
        )
        assert [choice.message.parsed for choice in answer.choices] == [Loom(name="Jacquard", kind="power")] * 2
        first, second = (request.constraint for request in stage.executor.requests)
        assert first == second
        assert first is not None
        assert first.kind == "json_schema"
        assert json.loads(first.text)["properties"].keys() == {"name", "kind"}


async def test_over_nats(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        inbox = stage.bus.client.new_inbox()
        stream = await stage.bus.client.subscribe(inbox)
        body = {"prompt": [5, 6], "structured_outputs": {"choice": ["a", "b"]}}
        await stage.bus.client.publish(subjects.GENERATE, msgspec.msgpack.encode(body), reply=inbox)
        while (await stream.next_msg(timeout=10)).data:
            pass
        assert stage.executor.requests[0].constraint == Constraint(kind="choice", text='["a","b"]')


async def test_an_executors_refusal_is_the_clients_error(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        stage.admission.rejection = Rejected(reason="invalid", message="regex: unclosed group")
        with pytest.raises(openai.BadRequestError, match="regex: unclosed group"):
            await stage.openai.completions.create(model=MODEL, prompt="x", extra_body={"structured_outputs": {"regex": "("}})


async def test_a_request_that_moves_keeps_its_constraint(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"skip": 3, "num_skips": 1}) as stage:
        await stage.openai.completions.create(model=MODEL, prompt="x", max_tokens=9, extra_body={"guided_regex": ".*"})
        first, second = stage.executor.requests
        assert first.constraint == second.constraint == Constraint(kind="regex", text=".*")
        assert (first.num_generated, second.num_generated) == (0, 3)
