"""Five services and NATS as processes, on the real model, used as a user would: openai client, NATS example, failures."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import nats
import openai
import pydantic
import pytest

from tests.stack import Stack, eventually

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(240)]

QUESTION = [{"role": "user", "content": "Write a Python function that returns the sum of a list of numbers."}]
LONG = [{"role": "user", "content": "Count from one to one hundred in words, one number per line."}]


@pytest.fixture(scope="module")
def stack(real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    # fp32: then a token does not depend on what else was in its batch, and texts can be compared.
    running = Stack(real_model_dir, tmp_path_factory.mktemp("stack") / "state", "--dtype", "float32").start()
    yield running
    if running.process.poll() is None:
        running.stop()


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def ask(client: openai.OpenAI, messages: Any = QUESTION, **options: Any) -> Any:
    settings: dict[str, Any] = {"model": "smollm2", "max_tokens": 24, "temperature": 0.0} | options
    return client.chat.completions.create(messages=messages, **settings)


class Reader(threading.Thread):
    """Reads a chat stream in the background; `text` grows, `gaps_ms` are the times between its chunks."""

    def __init__(self, client: openai.OpenAI, **options: Any) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self.times: list[float] = []
        self.finish_reason: str | None = None
        self.usage: Any = None
        self.failure: Exception | None = None
        self._client, self._options = client, options
        self.start()

    def run(self) -> None:
        try:
            options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} | self._options
            for chunk in ask(self._client, **options):
                if chunk.choices:
                    self.times.append(time.monotonic())
                    self.text += chunk.choices[0].delta.content or ""
                    self.finish_reason = chunk.choices[0].finish_reason or self.finish_reason
                self.usage = chunk.usage or self.usage
        except openai.OpenAIError as error:
            self.failure = error

    def result(self) -> str:
        """The whole text, once the stream has ended well."""
        self.join(120)
        assert not self.is_alive()
        assert self.failure is None, self.failure
        return self.text


def endless(client: openai.OpenAI, num_tokens: int) -> Reader:
    """A stream of exactly so many tokens."""
    return Reader(client, messages=LONG, max_tokens=num_tokens, extra_body={"ignore_eos": True})


# --- the fleet -----------------------------------------------------------------------------------------------------------


def test_the_screen_and_the_status_name_all_services(stack: Stack) -> None:
    assert stack.url in stack.screen
    assert "curl" in stack.screen
    status = stack.status()
    assert status["nats_url"].startswith("nats://")
    assert {service["name"] for service in status["services"]} == {"gateway", "admission", "planner", "executor", "trainer"}
    assert all(service["state"] == "ready" and service["id"] and "load" in service for service in status["services"])


async def test_ping_lists_all_five_services(stack: Stack) -> None:
    connection = await nats.connect(stack.nats_url)
    inbox = await connection.subscribe("answers")
    await connection.publish("$SRV.PING", reply="answers")
    names = {json.loads((await inbox.next_msg(5)).data)["name"] for _ in range(5)}
    assert names == {f"heddle-{name}" for name in ("gateway", "admission", "planner", "executor", "trainer")}
    await connection.close()


def test_the_nats_example_prints_the_tokens(stack: Stack, client: openai.OpenAI) -> None:
    example = Path(__file__).parents[1] / "docs" / "examples" / "nats_client.py"
    lines = [line for line in example.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) < 20
    command = [sys.executable, str(example), stack.nats_url, "Say hello."]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert printed.strip()


# --- OpenAI's API --------------------------------------------------------------------------------------------------------


def test_streams_and_whole_answers_agree(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=40)
    reader = Reader(client, max_tokens=40)
    assert reader.result() == whole.choices[0].message.content
    assert reader.finish_reason == whole.choices[0].finish_reason
    assert reader.usage.completion_tokens == whole.usage.completion_tokens > 1


def test_completions_stop_strings_and_seeds(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="smollm2", prompt="1, 2, 3, 4,", max_tokens=16, temperature=0)
    text = plain.choices[0].text
    stopped = client.completions.create(model="smollm2", prompt="1, 2, 3, 4,", max_tokens=16, temperature=0, stop=text[4:6])
    assert stopped.choices[0].text == text[: text.index(text[4:6])]
    assert stopped.choices[0].finish_reason == "stop"
    sampled = [ask(client, temperature=1.0, seed=seed).choices[0].message.content for seed in (7, 7, 8)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_the_logprobs_of_an_answer_are_those_of_its_echo(client: openai.OpenAI) -> None:
    """Told while decoding with draft trees, and again as a prompt, which a cached prefix must not shorten."""
    options: Any = {"model": "smollm2", "logprobs": 2, "temperature": 0}
    prompt = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n"
    told = client.completions.create(prompt=prompt, max_tokens=12, **options).choices[0]
    assert told.logprobs is not None
    again = client.completions.create(prompt=prompt + told.text, max_tokens=0, echo=True, **options).choices[0].logprobs
    assert again is not None
    assert (again.tokens or [])[-12:] == told.logprobs.tokens
    assert (again.token_logprobs or [])[-12:] == pytest.approx(told.logprobs.token_logprobs, abs=1e-3)
    penalised = client.completions.create(prompt=prompt, max_tokens=12, frequency_penalty=2, presence_penalty=2, **options)
    assert penalised.choices[0].text != told.text


class Person(pydantic.BaseModel):
    """What the model is to describe."""

    name: Annotated[str, pydantic.Field(max_length=10)]
    age: Annotated[int, pydantic.Field(ge=1, le=99)]


def test_constrained_output(client: openai.OpenAI) -> None:
    asked: Any = [{"role": "user", "content": "Describe a person in JSON: name and age."}]
    options: dict[str, Any] = {"model": "smollm2", "messages": asked, "max_tokens": 60, "n": 2, "seed": 1}
    answer = client.chat.completions.parse(response_format=Person, **options)
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 2
    assert all(isinstance(choice.message.parsed, Person) for choice in answer.choices)
    outputs: dict[str, Any] = {"structured_outputs": {"choice": ["warp", "weft"]}}
    chosen = client.completions.create(model="smollm2", prompt="Threads along a loom are the", stop=None, extra_body=outputs)
    assert chosen.choices[0].text in ("warp", "weft")
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        ask(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}})
    with pytest.raises(openai.BadRequestError, match="unclosed group"):
        ask(client, extra_body={"structured_outputs": {"regex": "(a"}})


def test_ignore_eos_runs_to_the_limit(client: openai.OpenAI) -> None:
    answer = ask(client, [{"role": "user", "content": "Say: hi"}], max_tokens=64, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 64
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("error", "param", "options"),
    [
        (openai.NotFoundError, "model", {"model": "no-such-model"}),
        (openai.BadRequestError, "max_tokens", {"max_tokens": 10**9}),
        (openai.BadRequestError, "n", {"n": 10**6}),
        (openai.BadRequestError, "temperature", {"temperature": "hot"}),
        (openai.BadRequestError, "messages", {"messages": [{"role": "user", "content": "word " * 20_000}]}),
    ],
)
def test_bad_requests_are_openai_errors(
    client: openai.OpenAI, error: type[openai.APIStatusError], param: str, options: Any
) -> None:
    with pytest.raises(error) as raised:
        ask(client, **options)
    body: Any = raised.value.body
    assert body["message"]
    assert {"message", "type", "param", "code"} <= set(body)
    assert body["param"] == param


def test_the_slo_of_a_request_is_kept_and_told(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=32, extra_headers={"x-slo-tpot-ms": "10000"})
    told = answer.usage.model_extra["slo"]
    assert told["target_tpot_ms"] == 10_000
    assert 0 < told["tpot_ms"] <= 10_000
    assert told["attained"] is True


# --- pages, cancel, disconnect -------------------------------------------------------------------------------------------


def test_pages_are_free_after_finish_and_disconnect(stack: Stack, client: openai.OpenAI) -> None:
    ask(client)
    stream = ask(client, LONG, stream=True, max_tokens=2000, extra_body={"ignore_eos": True})
    next(iter(stream))
    eventually(lambda: stack.executor_gauge("pages_in_use") > 0)
    stream.response.close()
    eventually(lambda: stack.executor_gauge("pages_in_use") == 0)
    assert stack.executor_gauge("pages_allocated") == stack.executor_gauge("pages_freed") > 0


# --- more of everything, and failures ------------------------------------------------------------------------------------


def test_speculation_is_on_by_default(stack: Stack, client: openai.OpenAI) -> None:
    code = [
        {
            "role": "user",
            "content": 'def add(a: int, b: int) -> int:\n    """Add two numbers.\n    >>> add(1, 2)\n    3\n    """\n',
        }
    ]
    ask(client, code, max_tokens=8)  # the executor looks for a planner when it first decodes
    answer = ask(client, code, max_tokens=96)
    told = answer.usage.model_extra["slo"]
    assert told["accepted_tokens"] > 0
    assert told["verify_steps"] < answer.usage.completion_tokens


def test_a_stream_goes_on_when_the_planner_is_killed(stack: Stack, client: openai.OpenAI) -> None:
    expected = endless(client, 160).result()
    before = stack.services("planner")[0]["id"]
    reader = endless(client, 160)
    eventually(lambda: len(reader.times) > 3)
    stack.kill("planner")
    assert reader.is_alive(), "the stream ended before the planner was killed"
    assert reader.result() == expected
    assert reader.usage.completion_tokens == 160
    eventually(lambda: any(s["id"] != before and s["state"] == "ready" for s in stack.services("planner")))


def test_services_started_by_hand_join_and_take_work(stack: Stack, client: openai.OpenAI) -> None:
    gateway_id = stack.start_by_hand("gateway", port="0")
    admission_id = stack.start_by_hand("admission")
    planner_id = stack.start_by_hand("planner")
    eventually(lambda: stack.services("executor")[0]["load"]["executor"]["planner_id"])
    executor_id = stack.start_by_hand("executor", dtype="float32")
    (gateway,) = [service for service in stack.services("gateway") if service["id"] == gateway_id]
    second = openai.OpenAI(base_url=f"{gateway['url']}/v1", api_key="none", max_retries=0)

    def all_worked() -> bool:
        readers = [Reader(second, messages=LONG, max_tokens=24) for _ in range(4)]
        assert all(reader.result() for reader in readers)
        loads = {s["id"]: s["load"] for name in ("admission", "executor", "planner") for s in stack.services(name)}
        return bool(
            loads[admission_id].get("admitted", 0) > 0
            and loads[executor_id].get("generated_tokens", 0) > 0
            and loads[planner_id].get("reports", 0) > 0
        )

    eventually(all_worked, 90)
    second.close()
    assert stack.stop_by_hand() == [0, 0, 0, 0]


def test_a_stream_survives_the_death_of_its_executor(stack: Stack, client: openai.OpenAI) -> None:
    expected = endless(client, 160).result()
    readers = [endless(client, 160) for _ in range(2)]
    eventually(lambda: all(len(reader.times) > 3 for reader in readers))
    stack.kill("executor")
    assert all(reader.is_alive() for reader in readers), "the streams ended before the executor was killed"
    assert all(reader.result() == expected for reader in readers)
    assert all(reader.usage.completion_tokens == 160 for reader in readers)


def test_ctrl_c_stops_everything(real_model_dir: Path, tmp_path: Path) -> None:
    running = Stack(real_model_dir, tmp_path / "state", "--speculation", "none").start()
    pids = [running.pid_of(name) for name in ("gateway", "admission", "planner", "executor", "trainer")]
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as plain:
        told = ask(plain, LONG, max_tokens=32).usage.model_extra["slo"]
        assert told["drafted_tokens"] == 0
    assert running.stop() == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIG_DFL)


async def test_an_external_nats_server_and_a_killed_one(real_model_dir: Path, tmp_path: Path) -> None:
    from common.nats_server import NatsServer

    server = NatsServer(tmp_path / "nats")
    server.start()
    running = Stack(real_model_dir, tmp_path / "state", "--nats", server.url)
    await asyncio.to_thread(running.start)
    assert running.nats_url == server.url
    server.kill()
    server.start()
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=20, timeout=60) as again:
        answer = await asyncio.to_thread(ask, again)
    assert answer.choices[0].message.content
    assert await asyncio.to_thread(running.stop) == 0
    server.stop()
