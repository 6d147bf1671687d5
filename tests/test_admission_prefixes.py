"""What admission knows of executors' cached prefixes: what a real executor then finds, and what placement makes of it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest

from common.messages import Beat, InferenceRequest, Rejected
from common.prefix import KEY_BYTES, MAX_TOLD_PAGES
from services.admission.policy import Placement, admit, forecast, prefill_ms
from services.admission.prefixes import Prefixes, page_keys
from services.executor.engine import Engine
from services.executor.load import cached_pages, executor_load
from tests.test_admission_policy import LIMITS, PROFILE, beat, load, request
from tests.test_executor_prefix import ask, engine_of
from tests.tiny import random_prompt, tiny_request


def beat_of(engine: Engine) -> Beat:
    told = executor_load(engine, "tiny", "", pages=cached_pages(engine))
    return Beat(role="executor", instance_id="e", state="ready", sent_at=0.0, period_s=1.0, executor=told)


def random_requests(seed: int, num: int) -> list[InferenceRequest]:
    """Requests with common beginnings, of three models and two tenants; some want their prompt's log probabilities."""
    rng = random.Random(seed)
    made = []
    for i in range(num):
        prompt = (*random_prompt(rng.choice([8, 16, 24]), seed=rng.randrange(3)), *random_prompt(rng.randint(0, 9), seed=i % 7))
        plain = tiny_request(f"r{i}", prompt, 3, cache_salt=rng.choice(["", "", "tenant"]))
        model, scores = rng.choice(["tiny", "tiny", "a", "b"]), 0 if rng.random() < 0.1 else None
        made.append(msgspec.structs.replace(plain, model=model, prompt_logprobs=scores))
    return made


@pytest.mark.parametrize(("num_pages", "seed"), [(96, 0), (24, 1), (14, 2)])
def test_what_is_expected_is_what_the_executor_finds(num_pages: int, seed: int) -> None:
    """Whatever was evicted, whichever adapter computed it and whoever's it is; an adapter that is loaded again starts anew."""
    engine, prefixes = engine_of(num_pages=num_pages), Prefixes()
    found: Counter[str] = Counter()
    for i, asked in enumerate(random_requests(seed, 80)):
        if i == 40:
            engine.adapters["a"] = engine_of().adapters["a"]
        prefixes.observe_beat(now := beat_of(engine))
        expected = prefixes.cached_tokens(asked, now)
        adapter = None if asked.model == "tiny" else asked.model
        fields = {"cache_salt": asked.cache_salt, "prompt_logprobs": asked.prompt_logprobs, "max_tokens": 3}
        assert ask(engine, asked.request_id, asked.prompt_tokens, adapter, **fields)[1] == expected
        found[asked.model] += expected
    assert min(found[model] for model in ("tiny", "a", "b")) > 0


def test_an_executor_that_caches_nothing_is_expected_to_have_nothing() -> None:
    engine, prefixes = engine_of(prefix_cache=False), Prefixes()
    asked = tiny_request("r", random_prompt(33), 3)
    prefixes.observe_beat(now := beat_of(engine))
    assert now.executor is not None
    assert now.executor.cached_pages is None
    prefixes.accepted(now, asked)
    assert prefixes.cached_tokens(asked, now) == 0


def caching(name: str = "e", **changes: object) -> Beat:
    told: dict[str, Any] = {"cached_pages": b"", "adapter_versions": (7,)}
    return beat(name, **(told | changes))


def test_what_was_sent_counts_until_a_beat_can_tell() -> None:
    prefixes, asked = Prefixes(), request(100)
    prefixes.observe_beat(caching())
    assert prefixes.cached_tokens(asked, caching()) == 0
    prefixes.accepted(caching(), asked)
    assert prefixes.cached_tokens(asked, caching()) == 96
    assert prefixes.cached_tokens(request(96), caching()) == 80, "the last token is always computed"
    assert prefixes.cached_tokens(request(100, cache_salt="other"), caching()) == 0
    assert prefixes.cached_tokens(request(100, model="tuned"), caching()) == 0
    assert prefixes.cached_tokens(request(100, prompt_logprobs=1), caching()) == 0
    assert prefixes.cached_tokens(asked, caching("f")) == 0
    prefixes.observe_beat(caching())
    assert prefixes.cached_tokens(asked, caching()) == 96, "sent before it may have been computed after it"
    prefixes.observe_beat(caching())
    assert prefixes.cached_tokens(asked, caching()) == 0
    keys = b"".join(page_keys(asked, load()))
    prefixes.observe_beat(caching(cached_pages=keys[: 4 * KEY_BYTES] + keys[5 * KEY_BYTES :]))
    assert prefixes.cached_tokens(asked, caching()) == 64, "up to the first page that is not there"
    prefixes.keep_only({"f"})
    assert prefixes.cached_tokens(asked, caching()) == 0


def test_a_model_that_is_not_resident_has_no_pages() -> None:
    assert list(page_keys(request(100, model="elsewhere", base_model="base"), load(adapter_versions=(7,)))) == []
    assert list(page_keys(request(2, prompt_tokens=(2**63,) * 32), load())) == [], "no token of any model"


def test_memory_is_bounded_however_much_is_sent_or_told() -> None:
    prefixes = Prefixes()
    prefixes.observe_beat(caching(cached_pages=bytes(range(256)) * 1000))
    for i in range(10):
        prefixes.accepted(caching(), request(prompt_tokens=tuple(range(i, i + 16 * 500))))
    pages = prefixes._pages["e"]
    assert len(pages.sent) == MAX_TOLD_PAGES
    assert len(pages.told) <= MAX_TOLD_PAGES


def decide(asked: InferenceRequest, cached: dict[str, int], *executors: Beat) -> Placement | Rejected:
    return admit(asked, executors, 50.0, LIMITS, (), cached)


def test_a_prompt_is_too_slow_only_by_what_is_not_cached() -> None:
    asked = request(800, ttft_ms=400.0, tpot_ms=100.0)
    queue = beat("e", waiting_prefill_tokens=100, num_waiting=LIMITS.max_waiting)
    assert isinstance(refusal := decide(asked, {}, queue), Rejected)
    assert refusal.reason == "overloaded"
    assert decide(asked, {"e": 640}, queue) == Placement(executor_id="e", best_effort=False)


def test_the_rest_of_a_prompt_is_predicted_behind_what_is_cached() -> None:
    costly = msgspec.structs.replace(PROFILE, ms_per_context_token=0.01, ms_per_row_context=0.001)
    rest = [prefill_ms(load(latency=costly), [500], 100) - prefill_ms(load(latency=costly), [200], 100)]
    assert prefill_ms(load(latency=costly), [300], 100, 200) == pytest.approx(rest[0])
    idle = [forecast(request(500), "e", load(latency=costly), 50.0, LIMITS, cached).ttft_ms for cached in (0, 96, 480)]
    assert idle == sorted(idle, reverse=True)


def test_a_prompt_that_is_scored_takes_longer() -> None:
    """Each row, whether its page is cached or not: all of them are computed."""
    scoring = load(latency=msgspec.structs.replace(PROFILE, ms_per_scored_row=0.5, correction=2.0))
    plain, scored = (forecast(request(400, prompt_logprobs=number), "e", scoring, 50.0, LIMITS).ttft_ms for number in (None, 0))
    assert scored - plain == pytest.approx(399 * 0.5 * 2.0)


def test_of_executors_that_keep_the_target_the_one_with_the_prefix_may_have_the_longer_queue() -> None:
    asked = request(500, ttft_ms=5000.0)
    idle = beat("idle")
    saved_ms = prefill_ms(load(), [500], 100) - prefill_ms(load(), [20], 100, 480)
    for waiting, expected in ((300, "has"), (1500, "idle")):
        busy = beat("has", waiting_prefill_tokens=waiting, num_waiting=1)
        assert (prefill_ms(load(), [waiting], 100) < 2 * saved_ms) == (expected == "has")
        assert decide(asked, {"has": 480}, busy, idle) == Placement(executor_id=expected, best_effort=False)
    tight = request(500, ttft_ms=prefill_ms(load(), [500], 100) + 1.0)
    late = beat("has", waiting_prefill_tokens=800, num_waiting=1)
    assert decide(tight, {"has": 480}, late, idle) == Placement(executor_id="idle", best_effort=False)
