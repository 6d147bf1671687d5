"""Draft trees inside the engine: the cache after they were accepted, and all the ways in which a tree can be wrong."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from common.latency import Rows, predict_ms
from common.messages import LoraSpec, OptimizerStep
from services.executor.engine import Engine
from services.executor.finetune import new_job
from services.executor.model import Decoder
from services.executor.sequences import Sequence
from services.executor.views import Limits
from tests.drafts import chain_tree, make_tree, oracle_draft
from tests.helpers import training_slice
from tests.tiny import (
    NUM_TOKENS,
    PROFILE,
    PROMPTS,
    Driver,
    all_requests,
    random_prompt,
    set_trees,
    tiny_engine,
    tiny_pair,
    tiny_request,
    truth,
)

SMALL_PASSES = Limits(max_batch_tokens=7, min_prefill_tokens=3)


@pytest.fixture
def decoder() -> Decoder:
    return tiny_pair()[1]


def cached_rows(engine: Engine, request_id: str, num_tokens: int) -> torch.Tensor:
    """Keys and values of a sequence's first tokens, in all layers."""
    slots = engine.sequences[request_id].table.slots(0, num_tokens)
    return torch.stack([cache[slots] for cache in (*engine.cache.k, *engine.cache.v)])


@pytest.mark.parametrize("seed", range(3))
def test_committed_rows_are_those_of_plain_decoding(decoder: Decoder, seed: int) -> None:
    """Checked after every pass, so that a row that is moved wrongly is seen before others overwrite it."""
    plain, drafted = Driver(tiny_engine(decoder)), Driver(tiny_engine(decoder), oracle_draft(truth(), seed))
    for driver in (plain, drafted):
        for request in all_requests():
            driver.engine.submit(request, None)
    for _ in range(NUM_TOKENS - 1):
        plain.step()
    num_checked = 0
    while drafted.engine.has_work:
        drafted.step()
        for name, sequence in drafted.engine.sequences.items():
            expected = cached_rows(plain.engine, name, sequence.num_computed)
            actual = cached_rows(drafted.engine, name, sequence.num_computed)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            num_checked += 1
    assert num_checked > 20
    assert drafted.engine.counters["accepted_tokens"] > 40


def decoding_engine(decoder: Decoder) -> tuple[Driver, Sequence]:
    """An engine whose request r4 decodes."""
    engine = tiny_engine(decoder, max_tree_nodes=8)
    engine.submit(tiny_request("r4", PROMPTS["r4"], NUM_TOKENS), None)
    driver = Driver(engine)
    driver.step()
    return driver, engine.sequences["r4"]


@pytest.mark.parametrize(
    ("counter", "changes"),
    [
        ("trees_orphaned", {"request_id": "nobody"}),
        ("trees_late", {"length": 0}),
        ("trees_late", {"length": 10**6}),
        ("trees_late", {"tokens": (0, 1, 2)}),
        ("trees_invalid", {"parents": (-1, 2, 1)}),
        ("trees_invalid", {"parents": (-1, 1, 0)}),
        ("trees_invalid", {"parents": (-1, 0)}),
        ("trees_invalid", {"parents": (-1, 0, -7)}),
        ("trees_invalid", {"tokens": (None, 97, 2)}),
        ("trees_invalid", {"tokens": (None, -1, 2)}),
        ("trees_invalid", {"tokens": (None, *range(9)), "parents": (-1, *range(9)), "probs": (0.5,) * 10}),
        ("trees_invalid", {"probs": (1.0, float("nan"), 0.5)}),
        ("trees_invalid", {"num_required": -3}),
    ],
)
def test_malformed_trees_are_counted_and_harmless(decoder: Decoder, counter: str, changes: dict[str, Any]) -> None:
    driver, sequence = decoding_engine(decoder)
    good = chain_tree(sequence, truth()["r4"], 2)
    if changes.get("tokens", (0,))[0] is None:
        changes = changes | {"tokens": (sequence.tokens[-1], *changes["tokens"][1:])}
    fields = {name: changes.get(name, getattr(good, name)) for name in good.__struct_fields__}
    set_trees(driver.engine, type(good)(**fields))
    assert driver.engine.counters[counter] == 1
    assert sequence.tree is None
    assert driver.step().draft_tokens == 0
    assert driver.run().tokens["r4"] == truth()["r4"]


def test_one_bad_tree_does_not_spoil_the_others(decoder: Decoder) -> None:
    driver, sequence = decoding_engine(decoder)
    good = chain_tree(sequence, truth()["r4"], 3)
    set_trees(driver.engine, make_tree("nobody", 3, [1], [-1]), good)
    iteration = driver.step()
    assert iteration.draft_tokens == 3
    assert iteration.progress[0].accepted_len == 3
    assert driver.run().tokens["r4"] == truth()["r4"]


def test_trees_beyond_the_total_budget_are_dropped_and_the_others_serve(decoder: Decoder) -> None:
    """AdaServe's B: 8 nodes for all, 6 for one; the planner sends 4 + 5, then 3 and 1 that still fit, and one of 7."""
    engine = tiny_engine(decoder, max_draft_tokens=8, max_tree_nodes=6)
    for request in all_requests():
        assert engine.submit(request, None) is None
    driver = Driver(engine)
    driver.step()
    names = sorted(engine.sequences)
    sizes = dict(zip(names, (4, 5, 3, 1, 7, 1), strict=True))
    set_trees(engine, *(chain_tree(engine.sequences[name], truth()[name], size) for name, size in sizes.items()))
    held = {name: len(tree.tokens) - 1 for name in names if (tree := engine.sequences[name].tree) is not None}
    assert held == {"r0": 4, "r2": 3, "r3": 1}
    assert (engine.counters["trees_over_budget"], engine.counters["trees_invalid"]) == (2, 1)
    iteration = driver.step()
    assert iteration.draft_tokens == 8
    accepted = {step.request_id: step.accepted_len for step in iteration.progress}
    assert accepted == {name: held.get(name, 0) for name in names}, "all of what was sent is right, and the dropped decode"
    assert driver.run().tokens == truth()


def test_a_tree_that_takes_an_earlier_ones_place_gives_its_nodes_back(decoder: Decoder) -> None:
    driver, sequence = decoding_engine(decoder)
    driver.engine.max_draft_tokens = 4
    set_trees(driver.engine, *(chain_tree(sequence, truth()["r4"], size) for size in (4, 3, 5)))
    assert driver.engine.counters["trees_over_budget"] == 1
    assert driver.step().draft_tokens == 3


def test_trees_for_sequences_that_do_not_decode_are_orphans(decoder: Decoder) -> None:
    engine = tiny_engine(decoder, limits=SMALL_PASSES)
    engine.submit(tiny_request("r4", PROMPTS["r4"], NUM_TOKENS), None)
    engine.submit(tiny_request("r5", PROMPTS["r5"], NUM_TOKENS), None)
    driver = Driver(engine)
    driver.step()
    set_trees(engine, chain_tree(engine.sequences["r4"], [], 2))
    cancelled = engine.sequences["r5"]
    engine.cancel("r5")
    set_trees(engine, chain_tree(cancelled, [], 2))
    assert engine.counters["trees_orphaned"] == 2
    assert driver.run().tokens["r4"] == truth()["r4"]


def test_the_latest_tree_of_a_sequence_counts_and_serves_one_pass(decoder: Decoder) -> None:
    driver, sequence = decoding_engine(decoder)
    set_trees(driver.engine, chain_tree(sequence, truth()["r4"], 4), chain_tree(sequence, truth()["r4"], 2))
    assert driver.step().draft_tokens == 2
    assert driver.step().draft_tokens == 0


def test_what_a_device_does_after_its_launches_returned_is_measured(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill chunk draws no token and a backward unit reads no loss: nothing else would wait for a GPU's work."""
    now = 1000.0

    def work_ends(device: torch.device) -> None:
        nonlocal now
        assert device == decoder.device
        now += 0.08

    monkeypatch.setattr("services.executor.engine.wait_for", work_ends)
    decoder = copy.copy(decoder)
    engine = tiny_engine(decoder, limits=Limits(max_batch_tokens=8), clock=lambda: now)
    engine.submit(tiny_request("r", random_prompt(30), 2), None)
    engine.forward_pass()
    assert predict_ms(engine.profile, Rows(8)) > 1.3 * predict_ms(PROFILE, Rows(8))
    engine.cancel("r")
    engine.training.open(new_job("job", LoraSpec(rank=2), 0, decoder, engine.cache), lease=1)
    engine.training.accept(training_slice(random_prompt(9), optimizer=OptimizerStep(learning_rate=1e-3)))
    while engine.has_work:
        engine.forward_pass()
        engine.backward_pass()
    assert engine.profile.backward_ms_per_token > PROFILE.backward_ms_per_token


def test_a_tree_that_does_not_fit_teaches_the_latency_model_nothing(decoder: Decoder) -> None:
    """16 slots, 11 of them taken: eight nodes do not fit, and the pass of one row is not what nine rows take."""
    ticks = itertools.count(1000.0, 0.05)
    engine = tiny_engine(decoder, num_pages=4, clock=lambda: next(ticks))
    engine.submit(tiny_request("r", random_prompt(10), 2), None)
    driver = Driver(engine)
    driver.step()
    learnt = engine.profile
    assert learnt != PROFILE, "a pass that went as planned counts"
    sequence = engine.sequences["r"]
    set_trees(engine, chain_tree(sequence, [], 8))
    assert sequence.tree is not None
    assert driver.step().draft_tokens == 0
    assert engine.profile == learnt
