"""Too little memory and missing devices: at the start one error that says what to change, in a pass smaller passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import ConfigError
from services.executor import startup
from services.executor.config import ExecutorConfig
from services.executor.device import MIN_BATCH_TOKENS, choose_device, is_out_of_memory
from services.executor.model import Decoder
from services.executor.startup import make_engine
from services.executor.views import Limits
from tests.executor_stage import known_profile, write_model
from tests.tiny import Driver, all_requests, random_prompt, serve, tiny_engine, tiny_pair, tiny_request, truth


class NoProfiles:
    """A store that has none and keeps none."""

    async def recall(self, key: str) -> None:
        return None

    async def keep(self, key: str, profile: object) -> None:
        pass


async def start(model_dir: Path, **settings: Any) -> Any:
    """What an executor with these settings starts with."""

    async def here(work: Any) -> Any:
        return work()

    defaults: dict[str, Any] = {"model_dir": str(model_dir), "dtype": "float32", "kv_cache_tokens": 512}
    config = ExecutorConfig(**(defaults | settings))
    return await make_engine(config, "tiny", NoProfiles(), here)  # type: ignore[arg-type]


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    known_profile(monkeypatch)
    return write_model(tmp_path)


async def test_a_pool_that_no_memory_could_hold_is_refused_with_its_size_and_setting(model_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"10000000000000 tokens takes 2560000\.0 GB as float32.*HEDDLE_EXECUTOR_KV_CACHE_TOKENS"
    ):
        await start(model_dir, kv_cache_tokens=10**13)


async def test_a_pool_that_cannot_be_had_is_refused_the_same_way(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here torch itself says no, in the words of its CPU allocator."""
    monkeypatch.setattr(startup, "memory_bytes", lambda device: 2**80)
    with pytest.raises(ConfigError, match=r"2560000\.0 GB as float32.* beside the weights: lower HEDDLE_EXECUTOR_KV"):
        await start(model_dir, kv_cache_tokens=10**13)


async def test_weights_that_do_not_fit_are_named(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Decoder:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(startup, "load_decoder", load)
    with pytest.raises(ConfigError, match=f"weights of {model_dir} do not fit into memory as float32"):
        await start(model_dir)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda:99", r"HEDDLE_EXECUTOR_DEVICE=cuda:99: "),
        ("gpu", r"HEDDLE_EXECUTOR_DEVICE=gpu: Expected one of cpu, cuda"),
        ("", r"HEDDLE_EXECUTOR_DEVICE=: "),
        ("xpu", r"HEDDLE_EXECUTOR_DEVICE=xpu: "),
    ],
)
async def test_a_device_that_is_not_there_is_refused_by_its_setting(model_dir: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        await start(model_dir, device=name)
    assert "\n" not in str(refused.value)
    assert choose_device("cpu") == torch.device("cpu")


def test_allocations_that_failed_are_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**58)
    assert is_out_of_memory(failed.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def with_room_for(monkeypatch: pytest.MonkeyPatch, decoder: Decoder, num_rows: int) -> list[int]:
    """Passes of more rows run out of memory; returns the sizes of those that did not."""
    forward, sizes = decoder.forward, []

    def bounded(batch: Any, cache: Any, *wanted: Any) -> torch.Tensor:
        if len(batch.tokens_T) > num_rows:
            torch.empty(2**58)
        sizes.append(len(batch.tokens_T))
        return forward(batch, cache, *wanted)

    monkeypatch.setattr(decoder, "forward", bounded)
    return sizes


def test_passes_that_do_not_fit_become_smaller_and_no_request_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_pair()[1]
    sizes = with_room_for(monkeypatch, decoder, 20)
    engine = tiny_engine(decoder, limits=Limits(max_batch_tokens=512))
    driver = serve(decoder, *all_requests(), engine=engine)
    assert dict(driver.streams.tokens) == truth()
    assert engine.counters["passes_out_of_memory"] == 2, "68 rows, then 34 did not fit"
    assert max(sizes) == 17
    assert engine.pages.num_free == engine.pages.num_pages


def test_a_pass_that_cannot_be_smaller_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_pair()[1]
    with_room_for(monkeypatch, decoder, MIN_BATCH_TOKENS - 1)
    engine = tiny_engine(decoder)
    assert engine.submit(tiny_request("r", random_prompt(40), 3), None) is None
    driver = Driver(engine)
    driver.step()
    assert engine.limits.max_batch_tokens == 20
    driver.step()
    with pytest.raises(RuntimeError, match="allocate"):
        driver.step()
    driver.streams.take(engine.release_all("out of memory"))
    assert driver.streams.reason("r") == "error"
    assert engine.pages.num_free == engine.pages.num_pages
