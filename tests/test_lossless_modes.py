"""Planner and engine together on a tiny model in fp32: greedy output is plain decoding's, whatever drafts, chooses or ends."""

from __future__ import annotations

import itertools

import pytest

from common.messages import IterationReport, Slo
from services.planner.actor import make_planner
from services.planner.config import PlannerConfig
from services.planner.planner import Planner
from tests.tiny import (
    NUM_TOKENS,
    Driver,
    all_requests,
    ending_at,
    random_prompt,
    set_trees,
    tiny_engine,
    tiny_pair,
    tiny_request,
    truth,
)

MODES = ("heddle", "adaserve", "throughput", "slo", "equal", "chain:3", "none")


def run_with_planner(driver: Driver, planner: Planner) -> dict[str, list[int]]:
    """The tokens of all requests, drafted for as over the bus."""
    engine = driver.engine
    while engine.has_work:
        iteration = driver.step()
        report = IterationReport(
            executor_id="executor",
            iteration=iteration.number,
            opened=iteration.opened,
            closed=tuple(chunk.request_id for chunk in iteration.chunks if chunk.finish_reason),
            progress=iteration.progress,
            token_budget=48,
            base_tokens=sum(sequence.is_decoding for sequence in engine.sequences.values()),
            t_spec_ms=5.0,
            latency=engine.profile,
        )
        set_trees(engine, *planner.answer(report, now=float(iteration.number)))
    assert engine.counters["trees_invalid"] == 0
    return driver.streams.tokens


@pytest.mark.parametrize("mode", MODES)
def test_greedy_output_is_that_of_plain_decoding_in_every_mode(mode: str) -> None:
    """The same prompts three times, so that later ones are drafted from the traffic and found in the prefix cache; a cache so
    small that sequences are preempted; an end token inside trees.
    """
    _, decoder = tiny_pair()
    end = truth()["r3"][NUM_TOKENS // 2]
    engine = tiny_engine(ending_at(decoder, end), num_pages=28)
    planner = make_planner(PlannerConfig(mode=mode, min_prob=0.001))
    for turn in range(3):
        driver = Driver(engine)
        for request in all_requests(cache_salt="ab"[turn == 1], slo=Slo(tpot_ms=2.0)):
            assert engine.submit(request, None) is None
        expected = {name: [*itertools.takewhile(lambda t: t != end, out), end][:NUM_TOKENS] for name, out in truth().items()}
        assert run_with_planner(driver, planner) == expected
    assert engine.counters["preemptions"] > 0
    assert (engine.counters["accepted_tokens"] > 20) == (mode != "none"), "hardly a draft was right: that proves little"


def test_a_tenants_traffic_is_drafted_from_and_anothers_is_not() -> None:
    """By the planner's own account, with requests as the executor opens them."""
    _, decoder = tiny_pair()
    prompt = random_prompt(12, seed=5)
    accepted = []
    for salts in (("x", "x"), ("x", "y")):
        engine, planner = tiny_engine(decoder), make_planner(PlannerConfig(mode="throughput"))
        for i, salt in enumerate(salts):
            before = engine.counters["accepted_tokens"]
            driver = Driver(engine)
            assert engine.submit(tiny_request(f"q{i}", prompt, NUM_TOKENS, cache_salt=salt), None) is None
            run_with_planner(driver, planner)
        accepted.append(engine.counters["accepted_tokens"] - before)
    same, other = accepted
    assert same > other
