"""Requests that cannot run, that are cancelled, and passes that fail."""

from __future__ import annotations

from typing import Any

import pytest

from common.messages import Sampling, Slo
from services.executor.model import Decoder
from tests.tiny import (
    NUM_TOKENS,
    PROMPTS,
    Driver,
    all_requests,
    serve,
    tiny_engine,
    tiny_pair,
    tiny_request,
    truth,
)


@pytest.fixture
def decoder() -> Decoder:
    return tiny_pair()[1]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": ()}, "invalid"),
        ({"prompt": (97,)}, "invalid"),
        ({"prompt": (5, -1)}, "invalid"),
        ({"max_tokens": 0}, "invalid"),
        ({"max_tokens": -5}, "invalid"),
        ({"max_tokens": 3, "num_generated": 3}, "invalid"),
        ({"num_generated": -1}, "invalid"),
        ({"prompt": (5, 6), "num_generated": 2}, "invalid"),
        ({"slo": Slo(tpot_ms=float("nan"))}, "invalid"),
        ({"slo": Slo(tpot_ms=0.0)}, "invalid"),
        ({"slo": Slo(ttft_ms=-1.0)}, "invalid"),
        ({"sampling": Sampling(temperature=float("nan"))}, "invalid"),
        ({"sampling": Sampling(temperature=-0.5)}, "invalid"),
        ({"sampling": Sampling(temperature=1.0, top_p=float("nan"))}, "invalid"),
        ({"arrived_at": float("nan")}, "invalid"),
        ({"cache_salt": "s" * 257}, "invalid"),
        ({"max_tokens": 250}, "too_long"),
        ({"request_id": "running"}, "duplicate"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(decoder: Decoder, fields: dict[str, Any], reason: str) -> None:
    engine = tiny_engine(decoder)
    engine.submit(tiny_request("running", PROMPTS["r3"], NUM_TOKENS), None)
    values: dict[str, Any] = {"request_id": "bad", "prompt": (5, 6, 7, 8, 9, 10, 11), "max_tokens": 4} | fields
    refusal = engine.submit(tiny_request(**values), None)
    assert refusal is not None
    assert refusal.reason == reason
    assert refusal.message
    assert set(engine.sequences) == {"running"}
    assert Driver(engine).run().tokens == {"running": truth()["r3"]}


def test_an_executor_that_is_full_says_when_to_come_back(decoder: Decoder) -> None:
    engine = tiny_engine(decoder, max_sequences=2)
    refusals = [engine.submit(request, None) for request in all_requests()]
    assert [refusal is None for refusal in refusals] == [True, True, False, False, False, False]
    assert refusals[-1] is not None
    assert refusals[-1].reason == "overloaded"
    assert refusals[-1].retry_after_ms > 0


def test_a_request_can_come_again_once_it_has_ended(decoder: Decoder) -> None:
    engine = tiny_engine(decoder)
    for _ in range(2):
        assert engine.submit(tiny_request("r3", PROMPTS["r3"], NUM_TOKENS), None) is None
        assert Driver(engine).run().tokens["r3"] == truth()["r3"]


def test_cancelling_ends_the_stream_and_frees_pages_at_once(decoder: Decoder) -> None:
    engine = tiny_engine(decoder)
    driver = Driver(engine)
    for request in all_requests():
        engine.submit(request, None)
    for _ in range(3):
        driver.step()
    for name in ("r5", "r2"):
        chunk = engine.cancel(name)
        assert chunk is not None
        driver.streams.take([chunk])
        assert driver.streams.reason(name) == "cancelled"
        assert driver.streams.tokens[name] == truth()[name][:3]
    assert engine.cancel("r5") is None
    assert engine.cancel("nobody") is None
    held = sum(len(sequence.table.pages) for sequence in engine.sequences.values())
    assert engine.pages.num_free == engine.pages.num_pages - held
    driver.run()
    assert {name: driver.streams.tokens[name] for name in ("r0", "r1", "r3", "r4")} == {
        name: truth()[name] for name in ("r0", "r1", "r3", "r4")
    }


def test_a_pass_that_fails_can_be_given_up(decoder: Decoder) -> None:
    engine = tiny_engine(decoder)
    driver = Driver(engine)
    for request in all_requests():
        engine.submit(request, None)
    driver.step()
    driver.streams.take(engine.release_all("the device is gone"))
    assert {driver.streams.reason(name) for name in PROMPTS} == {"error"}
    assert not engine.has_work
    assert engine.pages.num_free == engine.pages.num_pages
    assert serve(decoder, all_requests()[3], engine=engine).streams.tokens["r3"] == truth()["r3"]


def test_logits_that_are_not_finite_end_their_own_request_only(decoder: Decoder) -> None:
    engine = tiny_engine(decoder)
    driver = Driver(engine)
    for request in all_requests():
        engine.submit(request, None)
    while not all(sequence.is_decoding for sequence in engine.sequences.values()):
        driver.step()
    engine.cache.v[0][engine.sequences["r3"].table.slots(0, 1)[0]] = float("nan")
    driver.run()
    assert driver.streams.reason("r3") == "error"
    others = [name for name in PROMPTS if name != "r3"]
    assert {name: driver.streams.tokens[name] for name in others} == {name: truth()[name] for name in others}
    assert engine.pages.num_free == engine.pages.num_pages
