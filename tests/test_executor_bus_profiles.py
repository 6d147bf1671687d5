"""Latency profiles, which an executor keeps in the bus's bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common import subjects
from common.bus import Bus
from common.codec import decode, encode
from common.messages import LatencyProfile
from services.executor import startup
from tests.executor_stage import Connect, known_profile, running_executor, write_model
from tests.tiny import NUM_TOKENS, PROFILE, PROMPTS, tiny_request, truth

REQUEST = tiny_request("r3", PROMPTS["r3"], NUM_TOKENS)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


async def test_a_second_start_recalls_the_profile(
    connect: Connect, model_dir: Path, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_executor(connect, model_dir, max_batch_tokens=32) as stage:
        measured = stage.engine.profile
    assert [tokens for tokens, _ in measured.points] == [1, 8, 16, 32]
    assert measured.backward_ms_per_token > 0

    def fail(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(startup, "measure_profile", fail)
    async with running_executor(connect, model_dir, instance_id="executor-2") as stage:
        assert stage.engine.profile == measured
        await stage.admit(REQUEST)
        assert await stage.output("r3") == truth()["r3"]


async def test_a_profile_that_cannot_be_read_is_measured_again(
    connect: Connect, model_dir: Path, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_profile(monkeypatch)
    async with running_executor(connect, model_dir):
        pass
    bucket = await bus.key_value(subjects.PROFILES_BUCKET)
    (key,) = await bucket.keys()
    for bad in (b"garbage", encode({"points": "none"})):
        await bucket.put(key, bad)
        async with running_executor(connect, model_dir) as stage:
            assert stage.engine.profile == PROFILE
        kept = (await bucket.get(key)).value
        assert kept is not None
        assert decode(kept, LatencyProfile) == PROFILE
