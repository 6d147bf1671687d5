"""Sequences that are short of pages: who gives way, who waits, and that everybody ends with the same output."""

from __future__ import annotations

import functools

import pytest

from common.latency import Rows
from services.executor.assembly import Assembly
from services.executor.engine import Engine
from services.executor.pages import PageAllocator
from services.executor.scheduler import IterationPlan
from services.executor.sequences import Sequence
from services.executor.views import Limits
from tests.drafts import chain_tree, oracle_draft
from tests.tiny import Driver, greedy, random_prompt, set_trees, tiny_engine, tiny_pair, tiny_request

NUM_TOKENS = 20


@functools.cache
def continued(num_tokens: int, seed: int = 0) -> list[int]:
    """The greedy output after a random prompt."""
    return greedy(tiny_pair()[0], random_prompt(num_tokens, seed), NUM_TOKENS)


def small_engine(num_pages: int = 18, max_batch_tokens: int = 11) -> Engine:
    """72 slots, so that two sequences of 49 tokens do not fit. They share no page; test_executor_prefix.py's do."""
    limits = Limits(max_batch_tokens=max_batch_tokens, min_prefill_tokens=4)
    return tiny_engine(tiny_pair()[1], num_pages=num_pages, limits=limits, prefix_cache=False)


def submit(
    engine: Engine, name: str, num_tokens: int, *, max_tokens: int = NUM_TOKENS, arrived_at: float = 0.0, due_at: float = 0.0
) -> None:
    """A request with a random prompt."""
    request = tiny_request(name, random_prompt(num_tokens), max_tokens, arrived_at=arrived_at)
    assert engine.submit(request, None, due_at) is None


@pytest.mark.parametrize("max_batch_tokens", [11, 200])
def test_equal_arrivals_do_not_take_pages_from_each_other_in_turn(max_batch_tokens: int) -> None:
    engine = small_engine(max_batch_tokens=max_batch_tokens)
    for name in ("first", "second", "third"):
        submit(engine, name, 29)
    streams = Driver(engine).run(max_iterations=200)
    assert streams.tokens == dict.fromkeys(("first", "second", "third"), continued(29))
    assert list(streams.ends) == ["first", "second", "third"]
    assert engine.counters["preemptions"] <= 4


def test_a_young_request_with_a_deadline_does_not_starve_an_old_one_of_its_chunks() -> None:
    """The young one comes first in the plan, but the old one has the pages: it gets the room that the young one cannot use."""
    engine = small_engine()
    driver = Driver(engine)
    submit(engine, "old", 34)
    for _ in range(2):
        driver.step()
    submit(engine, "young", 50, max_tokens=4, arrived_at=1.0, due_at=1000.0)
    streams = driver.run(max_iterations=100)
    assert streams.tokens == {"old": continued(34), "young": continued(50)[:4]}


def test_the_oldest_sequence_is_never_preempted() -> None:
    engine = small_engine(max_batch_tokens=200)
    driver = Driver(engine)
    for i in range(5):
        submit(engine, f"r{i}", 20 + i, arrived_at=float(i))
    computed = 0
    while "r0" in engine.sequences:
        driver.step()
        if "r0" in engine.sequences:
            assert engine.sequences["r0"].num_computed > computed
            computed = engine.sequences["r0"].num_computed
    streams = driver.run()
    assert streams.tokens == {f"r{i}": continued(20 + i) for i in range(5)}
    assert engine.counters["preemptions"] > 0


def preempted(engine: Engine, driver: Driver) -> Sequence:
    """Iterate until the younger of two sequences has given its pages up."""
    submit(engine, "old", 21, arrived_at=0.0)
    submit(engine, "young", 22, arrived_at=1.0)
    sequence = engine.sequences["young"]
    while engine.counters["preemptions"] == 0:
        driver.step()
    assert engine.sequences["young"] is sequence
    return sequence


def test_a_preempted_sequence_goes_on_where_it_was() -> None:
    engine = small_engine()
    driver = Driver(engine)
    sequence = preempted(engine, driver)
    assert (sequence.num_computed, sequence.table.pages, sequence.tree) == (0, [], None)
    assert sequence.num_output > 0
    assert not sequence.is_decoding
    done, first_token_at = sequence.num_output, sequence.first_token_at
    while not sequence.is_decoding:
        driver.step()
    assert sequence.num_output == done + 1, "its prefill brings the next token"
    assert sequence.first_token_at == first_token_at
    (reopened,) = driver.iterations[-1].opened
    assert reopened.tokens == (*random_prompt(22), *continued(22)[: done + 1])
    assert reopened.num_output == done + 1
    assert driver.run().tokens == {"old": continued(21), "young": continued(22)}


def test_trees_of_a_preempted_sequence_are_orphans() -> None:
    engine = small_engine()
    driver = Driver(engine)
    sequence = preempted(engine, driver)
    set_trees(engine, chain_tree(sequence, continued(22), 3))
    assert engine.counters["trees_orphaned"] == 1
    assert sequence.tree is None
    assert driver.run().tokens["young"] == continued(22)


def test_a_preempted_sequence_can_be_cancelled() -> None:
    engine = small_engine()
    driver = Driver(engine)
    preempted(engine, driver)
    chunk = engine.cancel("young")
    assert chunk is not None
    driver.streams.take([chunk])
    driver.run()
    assert driver.streams.tokens["young"] == continued(22)[: len(driver.streams.tokens["young"])]
    assert engine.pages.num_allocated == engine.pages.num_freed


@pytest.mark.parametrize("seed", range(3))
def test_trees_preempt_nobody(seed: int) -> None:
    """A tree that does not fit beside the others is left out: it is a guess, they are not."""
    truth = {"old": continued(21), "young": continued(10)}
    engine = small_engine(num_pages=17, max_batch_tokens=200)
    driver = Driver(engine, oracle_draft(truth, seed))
    submit(engine, "old", 21, arrived_at=0.0)
    submit(engine, "young", 10, max_tokens=15, arrived_at=1.0)
    streams = driver.run()
    assert streams.tokens == {"old": truth["old"], "young": truth["young"][:15]}
    assert engine.counters["preemptions"] == 0
    assert engine.counters["accepted_tokens"] > 0


def sequence(name: str, num_tokens: int, pages: PageAllocator, *, num_computed: int, arrived_at: float) -> Sequence:
    request = tiny_request(name, random_prompt(num_tokens), 5, arrived_at=arrived_at)
    made = Sequence(
        request=request,
        tokens=list(request.prompt_tokens),
        table=pages.table(),
        adapter=None,
        stop_ids=frozenset(),
        first_token_due_at=None,
        num_output=0,
        num_computed=num_computed,
    )
    pages.reserve(made.table, num_computed)
    return made


def plan_of(**prefill: int) -> IterationPlan:
    rows = Rows(sum(prefill.values()))
    return IterationPlan(
        decode={},
        prefill=prefill,
        forward={},
        backward={},
        rows=rows,
        limit_ms=1.0,
        prefill_limit_ms=1.0,
        forward_ms=1.0,
        predicted_ms=1.0,
    )


def test_runnable_are_those_who_can_have_the_pages_they_need() -> None:
    pages = PageAllocator(8, 4)
    old = sequence("old", 30, pages, num_computed=12, arrived_at=1.0)
    middle = sequence("middle", 30, pages, num_computed=8, arrived_at=2.0)
    fits = sequence("fits", 12, pages, num_computed=0, arrived_at=3.0)
    too_long = sequence("too long", 13, pages, num_computed=0, arrived_at=3.0)
    last = sequence("last", 30, pages, num_computed=3, arrived_at=4.0)
    full = sequence("full", 30, pages, num_computed=8, arrived_at=5.0)
    everybody = [full, last, too_long, fits, middle, old]
    assert (pages.num_free, Assembly(pages).runnable(everybody)) == (0, [old, middle, fits, last])
    pages.release(old.table)
    assert full in Assembly(pages).runnable(everybody)


def test_a_chunk_is_cut_to_the_pages_there_are() -> None:
    pages = PageAllocator(6, 4)
    old = sequence("old", 30, pages, num_computed=13, arrived_at=1.0)
    young = sequence("young", 30, pages, num_computed=0, arrived_at=2.0)
    assembly = Assembly(pages)
    (work,) = assembly.work(plan_of(young=20), [young, old])
    assert (work.sequence, len(work.segment.tokens), work.segment.wants_logits) == (young, 8, "none")
    assert assembly.num_preemptions == 0
    (work,) = assembly.work(plan_of(old=11), [young, old])
    assert (work.sequence, len(work.segment.tokens)) == (old, 11)
    assert assembly.num_preemptions == 1
    assert young.table.pages == []


def test_nobody_is_preempted_in_vain() -> None:
    pages = PageAllocator(6, 4)
    old = sequence("old", 30, pages, num_computed=16, arrived_at=1.0)
    middle = sequence("middle", 30, pages, num_computed=3, arrived_at=2.0)
    young = sequence("young", 30, pages, num_computed=4, arrived_at=3.0)
    assembly = Assembly(pages)
    works = assembly.work(plan_of(old=14, middle=20, young=5), [young, old, middle])
    assert [(work.sequence, len(work.segment.tokens)) for work in works] == [(old, 8)]
    assert assembly.num_preemptions == 2
    assert pages.num_free == 0
