"""Constrained output of the engine: valid, drawn from the renormalised target, the same with trees and on another executor."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import msgspec
import pytest
import torch

from common.messages import Constraint, FinishReason, InferenceRequest, LoraSpec, Sampling
from services.executor.batch import Segment, build_batch
from tests.drafts import junk_draft, oracle_draft
from tests.grammars import CONSTRAINTS, constrained_engine, decoder, grammar, ids, state_of, text_of, tokenizer, vocabulary
from tests.helpers import CPU, new_cache, random_adapter
from tests.tiny import Driver, tiny_request

KINDS = list(CONSTRAINTS)
MAX_TOKENS = 70
TERSE = tuple((ids(text)[0], 4.0) for text in '"}],')
"""A random model seldom ends its strings and objects by itself."""
GREEDY, EVEN = Sampling(logit_bias=TERSE), Sampling(temperature=1.0, seed=11)
NARROW = Sampling(temperature=1.4, top_p=0.8, top_k=12, seed=5, logit_bias=TERSE, frequency_penalty=0.3)
SAMPLINGS = {"greedy": GREEDY, "even": EVEN, "narrow": NARROW}


def request(kind: str, sampling: Sampling, name: str = "r", max_tokens: int = MAX_TOKENS, **fields: Any) -> InferenceRequest:
    return tiny_request(name, ids("hello one"), max_tokens, sampling=sampling, constraint=CONSTRAINTS[kind][0], **fields)


def run(*requests: InferenceRequest, **options: Any) -> Driver:
    driver = Driver(constrained_engine(*requests, **options))
    driver.run()
    return driver


def batch_of_all() -> list[InferenceRequest]:
    """Each kind with each sampling, and a free one between them."""
    mixed = [request(kind, sampling, f"{kind} {name}") for kind in KINDS for name, sampling in SAMPLINGS.items()]
    return [*mixed[:4], tiny_request("free", ids("one two"), 30, sampling=EVEN), *mixed[4:]]


@functools.cache
def alone() -> dict[str, tuple[list[int], FinishReason | None]]:
    """What each request gets alone, without drafts."""
    found = {}
    for one in batch_of_all():
        streams = run(one).streams
        found[one.request_id] = (streams.tokens[one.request_id], streams.reason(one.request_id))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_finished_sample_is_what_was_asked_for(kind: str) -> None:
    requests = [request(kind, Sampling(temperature=1.0, seed=seed, logit_bias=TERSE), f"s{seed}") for seed in range(40)]
    streams = run(*requests).streams
    finished = {name: text_of(streams.tokens[name]) for name in streams.ends if streams.reason(name) == "stop"}
    assert len(finished) >= 30, "too few ended to prove anything"
    assert all(CONSTRAINTS[kind][1](text) for text in finished.values()), finished
    assert len(set(finished.values())) >= (3 if kind == "choice" else 10)


def test_without_a_constraint_the_model_says_something_else() -> None:
    tokens, _ = alone()["free"]
    assert not any(is_valid(text_of(tokens)) for is_valid in (CONSTRAINTS["regex"][1], CONSTRAINTS["choice"][1]))


@pytest.mark.parametrize("seed", range(2))
def test_output_is_the_same_with_trees_and_in_a_batch(seed: int) -> None:
    truth = {name: tokens for name, (tokens, _) in alone().items()}
    for draft in (None, oracle_draft(truth, seed), junk_draft(seed)):
        driver = Driver(constrained_engine(*batch_of_all()), draft)
        driver.run()
        assert driver.streams.tokens == truth
        assert {name: driver.streams.reason(name) for name in truth} == {name: reason for name, (_, reason) in alone().items()}
        if draft is not None:
            assert driver.engine.counters["draft_tokens"] > 100
    assert driver.engine.counters["iterations"] > 0


def test_right_drafts_save_passes() -> None:
    truth = {name: tokens for name, (tokens, _) in alone().items()}
    guessed = Driver(constrained_engine(*batch_of_all()), oracle_draft(truth))
    guessed.run()
    assert guessed.engine.counters["accepted_tokens"] > sum(map(len, truth.values())) / 3


@pytest.mark.parametrize("num_generated", [1, 4, 9])
def test_output_goes_on_on_another_executor(num_generated: int) -> None:
    moved, expected = [], {}
    for one in batch_of_all():
        tokens, _ = alone()[one.request_id]
        if len(tokens) > num_generated:
            prompt = (*one.prompt_tokens, *tokens[:num_generated])
            fields = {"sampling": one.sampling, "constraint": one.constraint, "num_generated": num_generated}
            moved.append(tiny_request(one.request_id, prompt, one.max_tokens, **fields))  # type: ignore[arg-type]
            expected[one.request_id] = tokens[num_generated:]
    assert len(moved) >= 7
    streams = run(*moved).streams
    assert streams.tokens == expected
    assert {name: streams.reason(name) for name in expected} == {name: alone()[name][1] for name in expected}


def test_a_preempted_sequence_keeps_its_place() -> None:
    requests = [request("json_schema", EVEN, f"r{i}", arrived_at=float(i)) for i in range(4)]
    roomy, tight = run(*requests), run(*requests, num_pages=50)
    assert tight.engine.counters["preemptions"] > 0
    assert tight.streams.tokens == roomy.streams.tokens


def test_choices_have_the_renormalised_probabilities() -> None:
    prompt, words, num_samples = ids("hello"), ["a", "b", "c"], 600
    constraint = Constraint(kind="choice", text='["a", "b", "c"]')
    segment = Segment(
        tokens=prompt, positions=range(len(prompt)), context_slots=[], slots=range(len(prompt)), wants_logits="last"
    )
    batch = build_batch([segment], CPU)
    logits_V = decoder().logits(decoder().forward(batch, new_cache(decoder()))[batch.logit_rows])[0].double()
    tokens = [ids(word)[0] for word in words]
    expected = torch.softmax(logits_V[tokens] / 1.5, 0).tolist()
    requests = [
        tiny_request(str(seed), prompt, 4, sampling=Sampling(temperature=1.5, seed=seed), constraint=constraint)
        for seed in range(num_samples)
    ]
    streams = run(*requests).streams
    counts = Counter(text_of(streams.tokens[name]) for name in streams.ends)
    assert sorted(counts) == words
    assert min(expected) * num_samples > 5, "the test of fit needs a few of each"
    statistic = sum((counts[word] - p * num_samples) ** 2 / (p * num_samples) for word, p in zip(words, expected, strict=True))
    assert statistic < 13.8, (counts, expected)  # chi-square of two degrees, p = 0.001
    assert {streams.reason(name) for name in streams.ends} == {"stop"}


def test_it_ends_where_the_grammar_does_or_the_model_wants_to() -> None:
    eos = tokenizer().eos_token_ids[0]
    tokens, reason = alone()["json_schema greedy"]
    if reason == "stop":
        assert text_of(tokens).endswith("}"), "complete: no pass is spent on an end token"
        assert tokens[-1] != eos
    open_end = Constraint(kind="regex", text="[a-z]+")
    requests = [
        tiny_request(f"s{seed}", ids("one"), 60, sampling=Sampling(temperature=1.0, seed=seed), constraint=open_end)
        for seed in range(20)
    ]
    streams = run(*requests).streams
    stopped = [streams.tokens[name] for name in streams.ends if streams.reason(name) == "stop"]
    assert stopped
    assert all(each[-1] == eos and len(each) > 1 for each in stopped)


def test_max_tokens_cuts_it_short() -> None:
    streams = run(request("json_schema", EVEN, max_tokens=5)).streams
    assert (streams.reason("r"), streams.tokens["r"]) == ("length", alone()["json_schema even"][0][:5])


def test_ignore_eos_goes_on_unconstrained() -> None:
    streams = run(request("choice", EVEN, max_tokens=40, ignore_eos=True)).streams
    assert (streams.reason("r"), len(streams.tokens["r"])) == ("length", 40)
    chosen = alone()["choice even"][0]
    assert streams.tokens["r"][: len(chosen)] == chosen


def test_stop_tokens_of_a_request_end_it_where_the_grammar_may_end() -> None:
    other_end = ids("<|endoftext|>")[0]
    assert other_end not in vocabulary().ends
    digits = Constraint(kind="regex", text="[0-9]+")
    named = tiny_request("r", ids("one"), 5, constraint=digits, stop_token_ids=(other_end, ids("o")[0], 10**6))
    state = state_of(named)
    assert state is not None
    before = state.allowed()
    state.advance(ids("7")[0])
    after = state.allowed()
    assert before is not None
    assert after is not None
    assert not before[other_end]
    assert after[other_end]
    assert after[tokenizer().eos_token_ids[0]]
    assert not after[ids("o")[0]]


def test_with_an_adapter() -> None:
    adapter = random_adapter(decoder(), LoraSpec(rank=2, alpha=4.0, target_modules=("q_proj", "down_proj")))
    plain = request("json_schema", EVEN)
    adapted = tiny_request("r", plain.prompt_tokens, MAX_TOKENS, sampling=EVEN, constraint=plain.constraint)
    adapted = msgspec.structs.replace(adapted, model="adapter")
    streams = run(adapted, adapters={"adapter": adapter}).streams
    assert streams.tokens["r"] != alone()["json_schema even"][0]
    if streams.reason("r") == "stop":
        assert CONSTRAINTS["json_schema"][1](text_of(streams.tokens["r"]))


def test_one_grammar_serves_many_sequences() -> None:
    compiled = grammar(CONSTRAINTS["choice"][0])
    first, second = compiled.start(), compiled.start()
    first.advance(ids("g")[0])
    allowed = second.allowed()
    assert allowed is not None
    assert allowed[ids("r")[0]]
