"""Sampled and adapted output is the same alone, in a batch, with draft trees, and continued on another executor."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from common.messages import InferenceRequest, LoraSpec, Sampling
from services.executor.engine import Engine
from services.executor.lora import LoraAdapter
from services.executor.model import Decoder
from services.executor.views import Limits
from tests.drafts import junk_draft, oracle_draft
from tests.helpers import random_adapter
from tests.tiny import NUM_TOKENS, PROMPTS, Driver, all_requests, serve, tiny_engine, tiny_pair, tiny_request, truth

SMALL_PASSES = Limits(max_batch_tokens=7, min_prefill_tokens=3)


@pytest.fixture
def decoder() -> Decoder:
    return tiny_pair()[1]


SAMPLINGS = {
    name: Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    for seed, (name, (temperature, top_p, top_k)) in enumerate(
        zip(PROMPTS, [(0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.9, 0), (1.3, 1.0, 20), (2.0, 0.8, 40), (0.3, 0.95, 5)], strict=True)
    )
}


def sampled(**fields: Any) -> list[InferenceRequest]:
    return [tiny_request(name, PROMPTS[name], NUM_TOKENS, sampling=SAMPLINGS[name], **fields) for name in PROMPTS]


@functools.cache
def samples() -> dict[str, list[int]]:
    """What each sampled request gets alone."""
    decoder = tiny_pair()[1]
    return {request.request_id: serve(decoder, request).streams.tokens[request.request_id] for request in sampled()}


def test_samples_depend_on_their_parameters(decoder: Decoder) -> None:
    assert samples()["r0"] == truth()["r0"]
    assert all(samples()[name] != truth()[name] for name in PROMPTS if name != "r0")
    other = tiny_request("r1", PROMPTS["r1"], NUM_TOKENS, sampling=Sampling(temperature=1.0, seed=77))
    assert serve(decoder, other).streams.tokens["r1"] != samples()["r1"]


@pytest.mark.parametrize("limits", [Limits(), SMALL_PASSES], ids=["wide", "narrow"])
def test_samples_are_the_same_alone_and_in_a_batch(decoder: Decoder, limits: Limits) -> None:
    assert serve(decoder, *sampled(), engine=tiny_engine(decoder, limits=limits)).streams.tokens == samples()


@pytest.mark.parametrize("seed", range(3))
def test_samples_are_the_same_with_trees(decoder: Decoder, seed: int) -> None:
    guessed = serve(decoder, *sampled(), draft=oracle_draft(samples(), seed))
    assert guessed.streams.tokens == samples()
    assert guessed.engine.counters["accepted_tokens"] > 40
    assert serve(decoder, *sampled(), draft=junk_draft(seed)).streams.tokens == samples()


@pytest.mark.parametrize("num_generated", [1, 7, NUM_TOKENS - 1])
def test_samples_go_on_on_another_executor(decoder: Decoder, num_generated: int) -> None:
    moved = [
        tiny_request(
            name,
            (*PROMPTS[name], *samples()[name][:num_generated]),
            NUM_TOKENS,
            sampling=SAMPLINGS[name],
            num_generated=num_generated,
        )
        for name in PROMPTS
    ]
    driver = serve(decoder, *moved, draft=oracle_draft(samples(), 5))
    assert driver.streams.tokens == {name: tokens[num_generated:] for name, tokens in samples().items()}
    usage = driver.streams.ends["r3"].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPTS["r3"]), NUM_TOKENS)


def adapters(decoder: Decoder) -> dict[str, LoraAdapter]:
    """Two adapters strong enough to change the output."""
    made = {}
    for seed, (name, targets) in enumerate({"a": ("q_proj", "v_proj"), "b": ("o_proj", "up_proj", "down_proj")}.items()):
        made[name] = random_adapter(decoder, LoraSpec(rank=2 + seed, alpha=4.0, target_modules=targets), seed=seed)
        made[name].name = name
    return made


def adapted_engine(decoder: Decoder, **overrides: Any) -> Engine:
    engine = tiny_engine(decoder, **overrides)
    engine.adapters |= adapters(decoder)
    return engine


@pytest.mark.parametrize("limits", [Limits(), SMALL_PASSES], ids=["wide", "narrow"])
def test_adapters_in_one_batch_do_not_touch_each_other(decoder: Decoder, limits: Limits) -> None:
    uses = {"r1": "a", "r2": "b", "r3": "a", "r5": "b"}
    solo = {}
    for request in all_requests():
        name = request.request_id
        solo[name] = serve(decoder, request, adapters=uses, engine=adapted_engine(decoder)).streams.tokens[name]
        assert (solo[name] == truth()[name]) == (name not in uses)
    for draft in (None, oracle_draft(solo, 6)):
        engine = adapted_engine(decoder, limits=limits)
        assert serve(decoder, *all_requests(), adapters=uses, engine=engine, draft=draft).streams.tokens == solo


def test_an_adapter_that_is_unloaded_or_replaced_serves_those_who_use_it_to_their_end(decoder: Decoder) -> None:
    (request,) = (request for request in all_requests() if request.request_id == "r4")
    uses = {"r4": "a"}
    alone = serve(decoder, request, adapters=uses, engine=adapted_engine(decoder)).streams.tokens["r4"]
    engine = adapted_engine(decoder)
    driver = Driver(engine)
    assert engine.submit(request, "a") is None
    for _ in range(4):
        driver.step()
    engine.adapters["a"] = engine.adapters.pop("b")
    newer = tiny_request("new", PROMPTS["r4"], NUM_TOKENS)
    assert engine.submit(newer, "a") is None
    driver.step()
    engine.adapters.clear()
    refused = engine.submit(tiny_request("x", PROMPTS["r4"], 3), "a")
    assert refused is not None
    assert refused.reason == "unknown_model"
    driver.run()
    assert driver.streams.tokens["r4"] == alone
    other = serve(decoder, newer, adapters={"new": "b"}, engine=adapted_engine(decoder)).streams.tokens["new"]
    assert driver.streams.tokens["new"] == other != alone
