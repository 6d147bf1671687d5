"""Adapters of the fleet, which an executor reads from the bus's buckets."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from common import subjects
from common.bus import Bus
from common.codec import encode
from common.messages import AdapterChecked, AdapterRecord, Admitted, Cancel, CheckAdapter, LoraSpec, Rejected
from services.executor.adapter_store import AdapterStore
from services.executor.lora import LoraAdapter
from tests.executor_stage import MODEL, Connect, Gate, Stage, known_profile, running_executor, write_model
from tests.helpers import random_adapter
from tests.tiny import NUM_TOKENS, PROMPTS, serve, tiny_engine, tiny_pair, tiny_request, truth

SPEC = LoraSpec(rank=2, alpha=4.0)
REQUEST = tiny_request("r3", PROMPTS["r3"], NUM_TOKENS)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def stage(connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    known_profile(monkeypatch)
    async with running_executor(connect, model_dir) as stage:
        yield stage


def make_adapter(seed: int = 0) -> LoraAdapter:
    return random_adapter(tiny_pair()[1], SPEC, seed=seed)


def expected(adapter: LoraAdapter) -> list[int]:
    """What an engine says with this adapter, which is not what the base model says."""
    engine = tiny_engine(tiny_pair()[1])
    engine.adapters["a"] = adapter
    tokens = serve(tiny_pair()[1], REQUEST, adapters={"r3": "a"}, engine=engine).streams.tokens["r3"]
    assert tokens != truth()["r3"]
    return tokens


async def store(bus: Bus, data: bytes, artifact: str = "ft:a") -> None:
    await (await bus.object_store(subjects.ARTIFACTS_STORE)).put(artifact, data)


async def announce(bus: Bus, name: str = "ft:a", **fields: Any) -> None:
    values: dict[str, Any] = {"artifact": "ft:a", "base_model": MODEL, "lora": SPEC, "created_at": 1.0} | fields
    record = encode(AdapterRecord(name=name, **values))
    await (await bus.key_value(subjects.ADAPTERS_BUCKET)).put(subjects.adapter_key(name), record)


async def has(stage: Stage, *names: str) -> None:
    """Returns when these adapters, and no others, are served."""
    await stage.poll(lambda: set(stage.engine.adapters) == set(names))


async def say(stage: Stage, model: str, request_id: str) -> list[int] | Rejected:
    answer = await stage.admit(msgspec.structs.replace(REQUEST, model=model, request_id=request_id))
    return await stage.output(request_id) if isinstance(answer, Admitted) else answer


async def withdraw(bus: Bus, name: str) -> None:
    await (await bus.key_value(subjects.ADAPTERS_BUCKET)).delete(subjects.adapter_key(name))


def held_reads(monkeypatch: pytest.MonkeyPatch, name: str) -> asyncio.Event:
    """This adapter's weights come when the event is set."""
    may_load, read_at_once = asyncio.Event(), AdapterStore._read

    async def read(store: AdapterStore, record: AdapterRecord) -> LoraAdapter | Rejected:
        if record.name == name:
            await may_load.wait()
        return await read_at_once(store, record)

    monkeypatch.setattr(AdapterStore, "_read", read)
    return may_load


async def test_an_announced_adapter_is_served_and_a_deleted_one_refused(stage: Stage) -> None:
    first, second = make_adapter(1), make_adapter(2)
    await store(stage.client, first.to_safetensors())
    await announce(stage.client)
    await has(stage, "ft:a")
    await stage.settled()
    assert stage.load.adapters == ("ft:a",)
    assert await say(stage, "ft:a", "1") == expected(first)
    await store(stage.client, second.to_safetensors(), "ft:a2")
    await announce(stage.client, artifact="ft:a2")
    before = stage.engine.adapters["ft:a"]
    await stage.poll(lambda: stage.engine.adapters.get("ft:a") not in (None, before))
    assert await say(stage, "ft:a", "2") == expected(second)
    await (await stage.client.key_value(subjects.ADAPTERS_BUCKET)).delete(subjects.adapter_key("ft:a"))
    await has(stage)
    refused = await say(stage, "ft:a", "3")
    assert isinstance(refused, Rejected)
    assert refused.reason == "unknown_model"
    assert await say(stage, MODEL, "4") == truth()["r3"]


async def test_a_deletion_does_not_wait_for_another_adapters_weights(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    await store(stage.client, make_adapter().to_safetensors())
    await announce(stage.client)
    await has(stage, "ft:a")
    may_load = held_reads(monkeypatch, "ft:slow")
    await announce(stage.client, "ft:slow")
    await stage.poll(lambda: "ft:slow" in stage.actor._adapters._loading)
    await withdraw(stage.client, "ft:a")
    await has(stage)
    may_load.set()
    await has(stage, "ft:slow")


async def test_an_adapter_that_is_deleted_while_it_is_loaded_is_not_served(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store(stage.client, make_adapter().to_safetensors())
    may_load = held_reads(monkeypatch, "ft:gone")
    await announce(stage.client, "ft:gone")
    await stage.poll(lambda: "ft:gone" in stage.actor._adapters._loading)
    await withdraw(stage.client, "ft:gone")
    await announce(stage.client, "ft:next")
    await stage.poll(lambda: set(stage.actor._adapters._records) == {"ft:next"})
    may_load.set()
    await has(stage, "ft:next")


async def test_a_running_request_keeps_an_adapter_that_is_deleted(stage: Stage) -> None:
    adapter = make_adapter()
    await store(stage.client, adapter.to_safetensors())
    await announce(stage.client)
    await has(stage, "ft:a")
    gate = Gate(stage.engine)
    saying = asyncio.create_task(say(stage, "ft:a", "1"))
    gate.let(3)
    await stage.tokens_of("1", 3)
    await (await stage.client.key_value(subjects.ADAPTERS_BUCKET)).delete(subjects.adapter_key("ft:a"))
    gate.open()
    assert await saying == expected(adapter)


async def test_adapters_are_served_from_the_start(
    connect: Connect, model_dir: Path, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_profile(monkeypatch)
    await store(bus, make_adapter().to_safetensors())
    await announce(bus)
    await announce(bus, "missing", artifact="nowhere")
    await announce(bus, "foreign", base_model="another")
    await (await bus.key_value(subjects.ADAPTERS_BUCKET)).put("garbage", b"\xc1")
    async with running_executor(connect, model_dir) as stage:
        assert await say(stage, "ft:a", "1") == expected(make_adapter())
        assert set(stage.engine.adapters) == {"ft:a"}


async def test_work_is_accepted_before_adapters_are_loaded(
    connect: Connect, model_dir: Path, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_profile(monkeypatch)
    await store(bus, make_adapter().to_safetensors())
    await announce(bus)
    may_load = held_reads(monkeypatch, "ft:a")
    async with running_executor(connect, model_dir) as stage:
        assert await say(stage, MODEL, "1") == truth()["r3"]
        assert not stage.engine.adapters
        may_load.set()
        assert await say(stage, "ft:a", "2") == expected(make_adapter())


@pytest.mark.parametrize(
    "fields",
    [
        {"artifact": "nowhere"},
        {"artifact": "garbage"},
        {"lora": LoraSpec(rank=0)},
        {"lora": LoraSpec(rank=3)},
        {"lora": LoraSpec(rank=10**15)},
        {"lora": LoraSpec(target_modules=("lm_head",))},
        {"base_model": "another"},
    ],
    ids=str,
)
async def test_an_unusable_adapter_is_left_out_until_it_is_repaired(stage: Stage, fields: dict[str, Any]) -> None:
    await store(stage.client, make_adapter().to_safetensors())
    await store(stage.client, b"garbage", "garbage")
    await announce(stage.client, "broken", **fields)
    await announce(stage.client, "good")
    await has(stage, "good")
    await announce(stage.client, "broken")
    await has(stage, "good", "broken")
    assert await say(stage, "broken", "1") == expected(make_adapter())


async def test_a_missing_artifact_that_comes_late_is_found_when_the_watch_is_renewed(
    connect: Connect, model_dir: Path, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_profile(monkeypatch)
    monkeypatch.setattr("common.records.REFRESH_S", 0.2)
    await announce(bus)
    async with running_executor(connect, model_dir) as stage:
        await has(stage)
        await store(bus, make_adapter().to_safetensors())
        await has(stage, "ft:a")


@pytest.fixture
async def narrow(connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    """An executor with two slots for four adapters, and not much patience."""
    known_profile(monkeypatch)
    monkeypatch.setattr("services.executor.adapter_store.LOAD_WAIT_S", 0.3)
    async with running_executor(connect, model_dir, max_loras=2, max_lora_rank=4) as stage:
        for i in range(4):
            await store(stage.client, make_adapter(i).to_safetensors(), f"o{i}")
            await announce(stage.client, f"a{i}", artifact=f"o{i}", created_at=float(i))
        await stage.poll(lambda: len(stage.actor._adapters._records) == 4)
        yield stage


async def test_adapters_beyond_the_slots_are_loaded_when_they_are_asked_for(narrow: Stage) -> None:
    for turn, i in enumerate((0, 1, 2, 3, 0, 3, 1)):
        assert await say(narrow, f"a{i}", f"r{turn}") == expected(make_adapter(i))
        assert len(narrow.engine.adapters) <= 2
    assert list(narrow.engine.adapters) == ["a3", "a1"]
    await narrow.settled()
    assert (narrow.load.adapters, narrow.load.max_loras) == (("a3", "a1"), 2)
    assert await say(narrow, MODEL, "base") == truth()["r3"]


async def test_many_requests_for_many_adapters_at_once_all_end_right(narrow: Stage) -> None:
    async def insist(i: int, request_id: str) -> None:
        for attempt in range(100):
            answer = await say(narrow, f"a{i}", f"{request_id}-{attempt}")
            if not isinstance(answer, Rejected):
                assert answer == expected(make_adapter(i))
                return
            assert (answer.reason, answer.retry_after_ms > 0) == ("overloaded", True)
        raise AssertionError("never served")

    await asyncio.gather(*(insist(n % 4, f"r{n}") for n in range(12)))
    assert len(narrow.engine.adapters) <= 2


async def test_an_adapter_in_use_is_not_evicted_and_the_request_for_another_is_told_to_come_back(
    narrow: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in (0, 1):
        await say(narrow, f"a{i}", f"first{i}")
    gate = Gate(narrow.engine)

    async def pace() -> None:
        """So slow that the requests below outlast the patience with slots."""
        while True:
            gate.let()
            await asyncio.sleep(0.005)

    pacing = asyncio.create_task(pace())
    for i in (0, 1):
        long = msgspec.structs.replace(REQUEST, model=f"a{i}", request_id=f"long{i}", max_tokens=240)
        assert isinstance(await narrow.admit(long), Admitted)
    refused = await say(narrow, "a2", "2")
    assert isinstance(refused, Rejected)
    assert (refused.reason, refused.retry_after_ms) == ("overloaded", 1000)
    assert refused.message == "all 2 adapter slots (max_loras) are in use"
    assert set(narrow.engine.adapters) == {"a0", "a1"}
    pacing.cancel()
    gate.open()
    for i in (0, 1):
        await narrow.client.publish(subjects.cancel(f"long{i}"), Cancel(request_id=f"long{i}"))
        await narrow.end(f"long{i}")
    monkeypatch.setattr("services.executor.adapter_store.LOAD_WAIT_S", 10.0)
    assert await say(narrow, "a2", "again") == expected(make_adapter(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"artifact": "nowhere"}, "adapter x: its weights .nowhere. are not in the object store"),
        ({"artifact": "garbage"}, "adapter x is not in safetensors format"),
        ({"lora": LoraSpec(rank=5)}, "adapter x: rank 5 is over max_lora_rank 4"),
        ({"lora": LoraSpec(rank=3)}, "rank and base model ask for .*; was it made for another model"),
        ({"lora": LoraSpec(rank=2, target_modules=("lm_head",))}, "target_modules must be some of .*, not lm_head"),
        ({"lora": LoraSpec(rank=2, target_modules=("q_proj",))}, "adapter x has unknown .* check targets and layers"),
    ],
    ids=str,
)
async def test_a_request_for_an_unusable_adapter_is_told_why(narrow: Stage, fields: dict[str, Any], message: str) -> None:
    await store(narrow.client, b"garbage", "garbage")
    await announce(narrow.client, "x", **({"artifact": "o0"} | fields))
    refused = await say(narrow, "x", "1")
    assert isinstance(refused, Rejected)
    assert refused.reason == "invalid"
    assert re.search(message, refused.message), refused.message
    values: dict[str, Any] = {"artifact": "o0", "lora": SPEC} | fields
    record = AdapterRecord(name="x", base_model=MODEL, created_at=1.0, **values)
    either: Any = AdapterChecked | Rejected
    checked = await narrow.client.request(subjects.check_adapter(MODEL), CheckAdapter(record=record), either)
    assert isinstance(checked, Rejected)
    assert re.search(message, checked.message)
    assert await say(narrow, "a0", "2") == expected(make_adapter(0))


async def test_served_adapters_have_the_models_type(connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known_profile(monkeypatch)
    async with running_executor(connect, model_dir, dtype="bfloat16") as stage:
        await store(stage.client, make_adapter().to_safetensors())
        await announce(stage.client)
        await has(stage, "ft:a")
        assert stage.engine.adapters["ft:a"].weights.flat.dtype == torch.bfloat16
