"""The engine's greedy output equals transformers', whatever else is in the batch or was drafted; how requests end."""

from __future__ import annotations

import functools

import pytest

from services.executor.model import Decoder
from services.executor.views import Limits
from tests.drafts import chain_tree, junk_draft, oracle_draft
from tests.tiny import (
    NUM_TOKENS,
    PROMPTS,
    Driver,
    all_requests,
    ending_at,
    greedy,
    serve,
    tiny_engine,
    tiny_pair,
    tiny_request,
    truth,
)

SMALL_PASSES = Limits(max_batch_tokens=7, min_prefill_tokens=3)


@pytest.fixture
def decoder() -> Decoder:
    return tiny_pair()[1]


def test_the_oracle_says_something() -> None:
    assert all(len(set(tokens)) > 3 for tokens in truth().values()), "a model that repeats itself proves little"


@pytest.mark.parametrize("limits", [Limits(), SMALL_PASSES], ids=["whole prompts", "chunked prompts"])
def test_greedy_output_is_that_of_transformers(decoder: Decoder, limits: Limits) -> None:
    for request in all_requests():
        alone = serve(decoder, request, engine=tiny_engine(decoder, limits=limits)).streams
        assert alone.tokens == {request.request_id: truth()[request.request_id]}
    together = serve(decoder, *all_requests(), engine=tiny_engine(decoder, limits=limits))
    assert together.streams.tokens == truth()
    assert {together.streams.reason(name) for name in PROMPTS} == {"length"}


def test_the_first_token_comes_once_the_whole_prompt_is_computed(decoder: Decoder) -> None:
    engine = tiny_engine(decoder, limits=SMALL_PASSES)
    engine.submit(tiny_request("r", PROMPTS["r4"], 5), None)
    driver = Driver(engine)
    assert [driver.step().prefill_tokens for _ in range(3)] == [7, 7, 5]
    assert [bool(iteration.chunks) for iteration in driver.iterations] == [False, False, True]
    (opened,) = driver.iterations[-1].opened
    assert opened.tokens == (*PROMPTS["r4"], truth()["r4"][0])
    assert (opened.num_output, opened.max_output) == (1, 5)
    assert driver.step().decode_tokens == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", [Limits(), SMALL_PASSES, Limits(max_batch_tokens=24)], ids=["wide", "narrow", "middling"])
def test_oracle_trees_change_the_number_of_passes_only(decoder: Decoder, seed: int, limits: Limits) -> None:
    plain = serve(decoder, *all_requests(), engine=tiny_engine(decoder, limits=limits))
    drafted = serve(decoder, *all_requests(), engine=tiny_engine(decoder, limits=limits), draft=oracle_draft(truth(), seed))
    assert drafted.streams.tokens == truth()
    share = 0.95 if limits is SMALL_PASSES else 0.7
    assert len(drafted.iterations) < share * len(plain.iterations)
    assert drafted.engine.counters["accepted_tokens"] > 10
    assert drafted.engine.counters["trees_invalid"] == drafted.engine.counters["trees_late"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_junk_trees_change_nothing(decoder: Decoder, seed: int) -> None:
    drafted = serve(decoder, *all_requests(), draft=junk_draft(seed))
    assert drafted.streams.tokens == truth()
    assert drafted.engine.counters["draft_tokens"] > 100
    assert drafted.engine.counters["trees_invalid"] == 0


def test_usage_adds_up(decoder: Decoder) -> None:
    driver = serve(decoder, *all_requests(), draft=oracle_draft(truth(), 1))
    for name, prompt in PROMPTS.items():
        usage = driver.streams.ends[name].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), NUM_TOKENS)
        assert usage.accepted_tokens + usage.verify_steps + 1 - NUM_TOKENS in (0, 1), "the last pass may lose its bonus token"
        assert 0 < usage.accepted_tokens <= usage.drafted_tokens
    counters = driver.engine.counters
    assert counters["generated_tokens"] == NUM_TOKENS * len(PROMPTS)
    assert counters["prefill_tokens"] == sum(len(prompt) for prompt in PROMPTS.values())
    num_bonus = counters["generated_tokens"] - counters["accepted_tokens"] - len(PROMPTS)
    assert counters["decode_tokens"] - len(PROMPTS) <= num_bonus <= counters["decode_tokens"]


def test_progress_tells_the_planner_every_token(decoder: Decoder) -> None:
    driver = serve(decoder, *all_requests(), draft=oracle_draft(truth(), 2))
    for name in PROMPTS:
        opened = [o for iteration in driver.iterations for o in iteration.opened if o.request_id == name]
        steps = [s for iteration in driver.iterations for s in iteration.progress if s.request_id == name]
        assert len(opened) == 1
        told = [*opened[0].tokens[len(PROMPTS[name]) :], *(token for step in steps for token in step.tokens)]
        assert told == truth()[name]
        assert [step.num_output for step in steps][-1] == NUM_TOKENS
        assert all(step.accepted_len <= step.num_drafted and step.accepted_len <= len(step.tokens) for step in steps)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6])
def test_max_tokens_inside_a_tree(decoder: Decoder, max_tokens: int) -> None:
    chain = oracle_draft(truth(), 3, max_depth=8)
    cut = [tiny_request(name, prompt, max_tokens) for name, prompt in PROMPTS.items()]
    driver = serve(decoder, *cut, draft=chain)
    assert driver.streams.tokens == {name: tokens[:max_tokens] for name, tokens in truth().items()}
    for name in PROMPTS:
        usage = driver.streams.ends[name].usage
        assert driver.streams.reason(name) == "length"
        assert usage is not None
        assert usage.accepted_tokens < max_tokens, "what was not sent was not accepted"


def test_a_request_that_ends_with_its_prefill_is_not_opened(decoder: Decoder) -> None:
    engine = tiny_engine(decoder)
    engine.submit(tiny_request("short", PROMPTS["r0"], 1), None)
    engine.submit(tiny_request("long", PROMPTS["r1"], 2), None)
    iteration = Driver(engine).step()
    assert [sequence.request_id for sequence in iteration.opened] == ["long"]
    assert set(engine.sequences) == {"long"}
    assert {chunk.request_id: chunk.finish_reason for chunk in iteration.chunks} == {"short": "length", "long": None}


@pytest.mark.parametrize("name", list(PROMPTS))
@pytest.mark.parametrize("speculates", [False, True])
def test_end_tokens_stop_also_inside_a_tree(decoder: Decoder, name: str, speculates: bool) -> None:
    tokens = truth()[name]
    unused = min(set(range(97)) - set(tokens))
    for end in sorted(set(tokens[:6])):
        expected = tokens[: tokens.index(end) + 1]
        draft = oracle_draft(truth(), 4, max_depth=8) if speculates else None
        by_model = serve(ending_at(decoder, unused, end), all_requests()[list(PROMPTS).index(name)], draft=draft)
        asked = tiny_request(name, PROMPTS[name], NUM_TOKENS, stop_token_ids=(end,))
        by_request = serve(decoder, asked, draft=draft)
        for driver in (by_model, by_request):
            assert driver.streams.tokens[name] == expected
            assert driver.streams.reason(name) == "stop"
            assert driver.engine.pages.num_free == driver.engine.pages.num_pages


def test_ignore_eos_ignores_the_models_end_tokens_only(decoder: Decoder) -> None:
    tokens = truth()["r4"]
    ending = ending_at(decoder, tokens[2])
    free = serve(ending, tiny_request("r4", PROMPTS["r4"], NUM_TOKENS, ignore_eos=True)).streams
    assert free.tokens["r4"] == tokens
    stop = next(token for token in tokens if token != tokens[2] and tokens.index(token) > 2)
    asked = tiny_request("r4", PROMPTS["r4"], NUM_TOKENS, ignore_eos=True, stop_token_ids=(stop,))
    assert serve(ending, asked).streams.tokens["r4"] == tokens[: tokens.index(stop) + 1]


def test_a_sequence_may_fill_all_positions_of_the_model(decoder: Decoder) -> None:
    """And a tree may reach to the last position, but not beyond it."""
    model, short = tiny_pair(max_position_embeddings=32)
    expected = greedy(model, PROMPTS["r4"], 13)
    for depth in (1, 5, 20):
        driver = serve(
            short, tiny_request("r4", PROMPTS["r4"], 13), draft=functools.partial(chain_tree, tokens=expected, depth=depth)
        )
        assert driver.streams.tokens["r4"] == expected
        assert (driver.engine.counters["accepted_tokens"] > 0) == (depth < 13)
        assert (driver.engine.counters["trees_invalid"] > 0) == (depth == 20)
    assert tiny_engine(short).submit(tiny_request("r4", PROMPTS["r4"], 14), None) is not None
