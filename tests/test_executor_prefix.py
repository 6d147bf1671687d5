"""Cached prefixes: whose pages are shared, who never finds them, and that outputs are the same without them."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from typing import Any

import pytest

from common import prefix
from common.messages import DraftTree, InferenceRequest, LoraSpec, OptimizerStep, Sampling, TrainingSlice
from services.executor.engine import Engine
from services.executor.finetune import new_job
from services.executor.sequences import Sequence
from services.executor.views import Limits
from tests.drafts import chain_tree, grow_tree
from tests.helpers import random_adapter
from tests.tiny import Driver, greedy, random_prompt, serve, set_trees, tiny_engine, tiny_pair, tiny_request

PAGE_SIZE = 4
PROMPT = random_prompt(33)


def engine_of(**overrides: Any) -> Engine:
    """A new engine with adapters a and b."""
    engine = tiny_engine(tiny_pair()[1], **overrides)
    engine.adapters = {name: random_adapter(engine.decoder, LoraSpec(rank=2), seed=i) for i, name in enumerate("ab")}
    return engine


def cached_tokens(driver: Driver, request_id: str) -> int:
    """What the request's usage says of the cache."""
    usage = driver.streams.ends[request_id].usage
    assert usage is not None
    return usage.cached_tokens


def ask(engine: Engine, request_id: str, prompt: Seq[int], adapter: str | None = None, **fields: Any) -> tuple[list[int], int]:
    """Output and cached tokens of a request that runs alone."""
    request = tiny_request(request_id, prompt, fields.pop("max_tokens", 6), **fields)
    driver = serve(engine.decoder, request, engine=engine, adapters={request_id: adapter} if adapter else None)
    return driver.streams.tokens[request_id], cached_tokens(driver, request_id)


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "num_cached"), [(33, 32), (32, 28), (31, 28), (5, 4), (4, 0), (1, 0)]
)  # at least one token is left to compute
def test_a_prompt_that_was_computed_is_not_computed_again(num_tokens: int, num_cached: int) -> None:
    engine, prompt = engine_of(), PROMPT[:num_tokens]
    truth = greedy(tiny_pair()[0], prompt, 6)
    assert ask(engine, "first", prompt) == (truth, 0)
    before = engine.counters["prefill_tokens"]
    assert ask(engine, "again", prompt) == (truth, num_cached)
    assert engine.counters["prefill_tokens"] - before == num_tokens - num_cached
    assert engine.counters["prefix_cache_queries"] == 2 * num_tokens
    assert engine.counters["prefix_cache_hits"] == num_cached
    assert engine.pages.num_free == engine.pages.num_pages


def test_the_next_turn_of_a_conversation_finds_prompt_and_answer() -> None:
    """Also when the answer came from trees whose accepted rows were moved, and ended within an accepted path."""
    engine = engine_of()
    answer = greedy(tiny_pair()[0], PROMPT, 20)
    driver = Driver(engine, lambda sequence: grow_tree(sequence, answer[sequence.num_output :], random.Random(1)))
    engine.submit(tiny_request("first", PROMPT, 20, stop_token_ids=(answer[14],)), None)
    said = driver.run().tokens["first"]
    assert said == answer[: answer.index(answer[14]) + 1]
    assert engine.counters["accepted_tokens"] > 3
    turn = (*PROMPT, *said, *random_prompt(9, seed=2))
    output, num_cached = ask(engine, "second", turn)
    assert output == greedy(tiny_pair()[0], turn, 6)
    assert num_cached == (len(PROMPT) + len(said) - 1) // PAGE_SIZE * PAGE_SIZE, "all but the last token had been computed"


def test_requests_side_by_side_share_what_the_first_has_computed() -> None:
    engine = engine_of(limits=Limits(max_batch_tokens=12, min_prefill_tokens=12))
    truth = greedy(tiny_pair()[0], PROMPT, 6)
    requests = [tiny_request(f"r{i}", PROMPT, 6) for i in range(4)]
    driver = serve(engine.decoder, *requests, engine=engine)
    assert driver.streams.tokens == {request.request_id: truth for request in requests}
    assert engine.counters["prefill_tokens"] < 2 * len(PROMPT)


def test_nothing_is_cached_when_it_is_switched_off() -> None:
    engine = engine_of(prefix_cache=False)
    for name in ("first", "again"):
        assert ask(engine, name, PROMPT) == (greedy(tiny_pair()[0], PROMPT, 6), 0)
    assert (engine.counters["prefix_cache_queries"], engine.pages.num_cached) == (0, 0)


def test_a_prompt_whose_rows_are_needed_is_computed() -> None:
    engine = engine_of()
    ask(engine, "first", PROMPT)
    engine.submit(tiny_request("rows", PROMPT, 6, prompt_logprobs=1), None)
    driver = Driver(engine)
    assert driver.step().prefill_tokens == len(PROMPT)
    scores = [chunk.prompt_logprobs for chunk in driver.iterations[0].chunks if chunk.prompt_logprobs]
    assert sum(len(score.chosen) for score in scores) == len(PROMPT) - 1
    sequence = engine.sequences["rows"]
    sequence.publish(engine.pages)
    sequence.give_back(engine.pages)
    assert driver.step().prefill_tokens == len(PROMPT) + 1 - 32, "they were told"


def test_adapters_and_salts_find_only_their_own_pages() -> None:
    engine = engine_of()
    outputs: dict[tuple[str | None, str], list[int]] = {}
    for adapter in (None, "a", "b"):
        for salt in ("", "tenant"):
            output, num_cached = ask(engine, f"{adapter}-{salt}", PROMPT, adapter, cache_salt=salt)
            assert num_cached == 0
            outputs[adapter, salt] = output
    for (adapter, salt), output in outputs.items():
        assert ask(engine, f"again-{adapter}-{salt}", PROMPT, adapter, cache_salt=salt) == (output, 32)
    assert outputs[None, ""] == outputs[None, "tenant"]
    assert len({tuple(outputs[adapter, ""]) for adapter in (None, "a", "b")}) == 3


def test_an_adapter_that_is_loaded_again_under_its_name_starts_anew() -> None:
    engine, fresh = engine_of(), engine_of()
    ask(engine, "old", PROMPT, "a")
    engine.adapters["a"] = random_adapter(engine.decoder, LoraSpec(rank=2), seed=9)
    fresh.adapters["a"] = random_adapter(engine.decoder, LoraSpec(rank=2), seed=9)
    assert ask(engine, "new", PROMPT, "a") == (ask(fresh, "new", PROMPT, "a")[0], 0)


def test_training_neither_uses_nor_fills_the_cache() -> None:
    engine = engine_of()
    tokens = random_prompt(24, seed=5)
    engine.training.open(new_job("job", LoraSpec(rank=2), 0, engine.decoder, engine.cache), lease=1)

    def train(step: int) -> int:
        weights = (0.0, *[0.05] * (len(tokens) - 1))
        optimizer = OptimizerStep(learning_rate=1e-2)
        engine.training.accept(
            TrainingSlice(job_id="job", lease=1, step=step, index=0, tokens=tokens, weights=weights, optimizer=optimizer)
        )
        before = engine.counters["finetune_tokens"]
        Driver(engine).run()
        return engine.counters["finetune_tokens"] - before

    num_rows = train(0)
    assert engine.pages.num_cached == 0
    assert ask(engine, "after", tokens)[1] == 0
    assert ask(engine, "again", tokens)[1] == 20
    assert train(1) == num_rows == len(tokens) - 1


def test_what_a_failed_pass_or_request_computed_is_not_kept() -> None:
    engine = engine_of()
    truth = greedy(tiny_pair()[0], PROMPT, 6)
    ask(engine, "first", PROMPT)
    engine.submit(tiny_request("broken", PROMPT, 6), None)
    Driver(engine).step()
    (page, *_) = engine.sequences["broken"].table.pages
    engine.cache.v[0][page * PAGE_SIZE] = float("nan")
    driver = Driver(engine)
    driver.streams._next_seq["broken"] = 1
    assert driver.run().reason("broken") == "error"
    assert ask(engine, "after", PROMPT) == (truth, 0)
    engine.release_all("the pass failed")
    assert engine.pages.num_cached == 0
    assert ask(engine, "later", PROMPT) == (truth, 0)


def test_each_full_page_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    digest = prefix._digest

    def counted(data: bytes) -> bytes:
        hashed.append(len(data))
        return digest(data)

    monkeypatch.setattr(prefix, "_digest", counted)
    engine = engine_of()
    driver = Driver(engine)
    engine.submit(tiny_request("r", PROMPT, 40), None)
    for num_tokens in range(len(PROMPT), len(PROMPT) + 40):
        driver.step()
        assert len(hashed) <= 1 + num_tokens // PAGE_SIZE
    assert not engine.has_work
    assert len(hashed) == 1 + (len(PROMPT) + 40 - 1) // PAGE_SIZE
    assert max(hashed) == 32 + 8 * PAGE_SIZE, "a page and its parent, however long the context"


# --- the same outputs -------------------------------------------------------------------------------------------------

POOLS: dict[str, dict[str, Any]] = {
    "roomy": {"num_pages": 96},
    "tight": {"num_pages": 20, "limits": Limits(max_batch_tokens=40, min_prefill_tokens=4)},
    "odd": {"num_pages": 11, "page_size": 7, "limits": Limits(max_batch_tokens=17, min_prefill_tokens=4)},
}


def tree_for(sequence: Sequence, rng: random.Random) -> DraftTree | None:
    """A tree that often repeats what the prompt holds: some of it is accepted."""
    return grow_tree(sequence, sequence.tokens[1:4], rng) if rng.random() < 0.8 else None


def mixed_requests(seed: int) -> list[tuple[InferenceRequest, str | None]]:
    """Requests with a few common beginnings: greedy and sampled, with and without adapters."""
    rng = random.Random(seed)
    made: list[tuple[InferenceRequest, str | None]] = []
    for i in range(24):
        prompt = (*random_prompt(rng.choice([9, 16, 24]), seed=rng.randrange(2)), *random_prompt(rng.randint(0, 9), seed=i))
        sampling = rng.choice([Sampling(), Sampling(temperature=0.9, seed=i), Sampling(temperature=0.7, top_p=0.8, seed=i)])
        request = tiny_request(f"r{i}", prompt, rng.randint(1, 16), sampling=sampling, arrived_at=float(i // 3))
        made.append((request, rng.choice([None, None, "a", "b"])))
    return made


def outputs_of(engine: Engine, seed: int, *, has_trees: bool) -> dict[str, list[int]]:
    """What all requests got, three more of them every other iteration."""
    rng = random.Random(seed)
    driver = Driver(engine, (lambda sequence: tree_for(sequence, rng)) if has_trees else None)
    for i, (request, adapter) in enumerate(mixed_requests(seed)):
        assert engine.submit(request, adapter) is None
        if i % 3 == 2:
            driver.step()
            driver.step()
    return dict(driver.run().tokens)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("pool", POOLS)
def test_outputs_do_not_depend_on_the_cache(pool: str, seed: int) -> None:
    cached, plain = engine_of(**POOLS[pool]), engine_of(num_pages=96, prefix_cache=False)
    assert outputs_of(cached, seed, has_trees=True) == outputs_of(plain, seed, has_trees=False)
    assert cached.counters["prefix_cache_hits"] > 50
    assert cached.counters["drafts"] > 10
    assert cached.counters["prefill_tokens"] < plain.counters["prefill_tokens"] or pool != "roomy"
    assert pool == "roomy" or cached.counters["preemptions"] > 0
    assert cached.pages.num_free == cached.pages.num_pages


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    engine = engine_of(num_pages=18, limits=Limits(max_batch_tokens=40))
    driver = Driver(engine)
    prompts = {"old": random_prompt(21, seed=1), "young": random_prompt(22, seed=2)}
    for i, (name, prompt) in enumerate(prompts.items()):
        engine.submit(tiny_request(name, prompt, 20, arrived_at=float(i)), None)
    young = engine.sequences["young"]
    while not engine.counters["preemptions"]:
        driver.step()
    length = len(young.tokens)
    while not young.num_computed:
        driver.step()
    assert young.table.num_taken >= 2, "cached until the old one needed them"
    assert driver.iterations[-1].prefill_tokens <= length - young.table.num_taken * PAGE_SIZE
    streams = driver.run()
    assert streams.tokens == {name: greedy(tiny_pair()[0], prompt, 20) for name, prompt in prompts.items()}
    assert cached_tokens(driver, "young") == 0, "what it had computed itself"


def test_a_preempted_sequence_may_come_back_decoding() -> None:
    """All but its last token is cached: the next pass takes its root, and a tree below it, at once."""
    engine = engine_of()
    driver = Driver(engine)
    truth = greedy(tiny_pair()[0], PROMPT[:21], 20)
    engine.submit(tiny_request("r", PROMPT[:21], 20), None)
    sequence = engine.sequences["r"]
    while len(sequence.tokens) % PAGE_SIZE != 1 or not sequence.is_decoding:
        driver.step()
    sequence.publish(engine.pages)
    sequence.give_back(engine.pages)
    assert not sequence.is_decoding
    assert driver.step().decode_tokens == 1
    set_trees(engine, chain_tree(sequence, truth, 3))
    assert driver.run().tokens["r"] == truth
