"""Pages: the allocator alone, then under an engine that is asked at random for everything it can do."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from typing import Any

import pytest

from common.messages import DraftTree, LoraSpec, OptimizerStep, Sampling, TrainingSlice
from services.executor.engine import Engine
from services.executor.finetune import new_job
from services.executor.pages import OutOfPagesError, PageAllocator
from services.executor.sequences import Sequence
from services.executor.training import TooManySlicesError
from services.executor.views import Limits
from tests.drafts import grow_tree
from tests.tiny import Driver, greedy, random_prompt, serve, set_trees, tiny_engine, tiny_pair, tiny_request

# --- the allocator ----------------------------------------------------------------------------------------------------


def test_a_table_grows_by_whole_pages() -> None:
    pages = PageAllocator(5, 4)
    table = pages.table()
    for num_tokens, num_pages in ((0, 0), (1, 1), (4, 1), (5, 2), (3, 2), (12, 3)):
        assert pages.missing(table, num_tokens) == max(0, num_pages - len(table.pages))
        pages.reserve(table, num_tokens)
        assert len(table.pages) == num_pages
    assert pages.num_free == 2
    assert table.slots(2, 6).tolist() == [
        table.pages[0] * 4 + 2,
        table.pages[0] * 4 + 3,
        table.pages[1] * 4,
        table.pages[1] * 4 + 1,
    ]
    assert table.slots(3, 3).tolist() == []


def test_a_reservation_that_cannot_be_met_changes_nothing() -> None:
    pages = PageAllocator(3, 2)
    one, two = pages.table(), pages.table()
    pages.reserve(one, 3)
    before = list(one.pages)
    with pytest.raises(OutOfPagesError, match="2 pages needed, 1 free"):
        pages.reserve(two, 4)
    with pytest.raises(OutOfPagesError):
        pages.reserve(one, 7)
    assert (one.pages, two.pages, pages.num_free, pages.num_allocated) == (before, [], 1, 2)
    pages.reserve(two, 2)
    assert pages.num_free == 0


def test_released_pages_are_free_once() -> None:
    pages = PageAllocator(3, 2)
    table = pages.table()
    pages.reserve(table, 6)
    for _ in range(2):
        pages.release(table)
        assert (pages.num_free, pages.num_allocated, pages.num_freed, table.pages) == (3, 3, 3, [])


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_needs_pages(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PageAllocator(num_pages, page_size)


def test_no_page_is_in_two_tables() -> None:
    rng = random.Random(0)
    pages = PageAllocator(40, 4)
    tables = [pages.table() for _ in range(8)]
    num_refused = 0
    for _ in range(2000):
        table = rng.choice(tables)
        if rng.random() < 0.2:
            pages.release(table)
        else:
            try:
                pages.reserve(table, rng.randint(0, 60))
            except OutOfPagesError:
                num_refused += 1
        held = list(itertools.chain.from_iterable(each.pages for each in tables))
        assert len(held) == len(set(held)) == pages.num_pages - pages.num_free == pages.num_allocated - pages.num_freed
        assert set(held) <= set(range(40))
    assert num_refused > 100


def check_partition(pages: PageAllocator, held: Counter[int]) -> None:
    """Every page is free, cached or held, and referenced as often as tables hold it."""
    assert sorted([*held, *pages._free, *pages._cached]) == list(range(pages.num_pages)), "a page is lost, or in two states"
    assert pages._num_references == [held[page] for page in range(pages.num_pages)]
    assert pages.num_allocated - pages.num_freed == held.total()
    assert {page: digest for digest, page in pages._page_of.items()} == pages._digest_of
    assert pages._cached.keys() == pages._digest_of.keys() - held.keys()


# --- the engine -------------------------------------------------------------------------------------------------------

LENGTHS = (1, 3, 7, 12, 20, 29)
LONGEST = 24


@functools.cache
def expected() -> dict[tuple[int, bool], tuple[tuple[int, ...], list[int]]]:
    """Prompt and output alone, greedy (from transformers) and sampled, per prompt."""
    model, decoder = tiny_pair()
    found = {}
    for i, num_tokens in enumerate(LENGTHS):
        prompt = random_prompt(num_tokens, seed=100 + i)
        found[i, False] = prompt, greedy(model, prompt, LONGEST)
        sampled = tiny_request("r", prompt, LONGEST, sampling=Sampling(temperature=0.9, seed=i))
        found[i, True] = prompt, serve(decoder, sampled).streams.tokens["r"]
    return found


class Storm:
    """Random events on one engine. Every pass is checked; `settle` brings everything to its end and checks the outcome."""

    def __init__(self, seed: int, **overrides: Any) -> None:
        self.rng = random.Random(seed)
        self.decoder = tiny_pair()[1]
        self.engine: Engine = tiny_engine(self.decoder, **overrides)
        self.driver = Driver(self.engine, self.draft)
        self.wanted: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.slices: dict[str, tuple[int, int]] = {}
        self.ids = itertools.count()

    def draft(self, sequence: Sequence) -> DraftTree | None:
        truth = self.wanted[sequence.request_id][sequence.num_output :]
        tree = grow_tree(sequence, truth if self.rng.random() < 0.7 else [], self.rng)
        match self.rng.randrange(10):
            case 0:
                return None
            case 1:
                set_trees(self.engine, DraftTree(request_id=tree.request_id, length=1, tokens=(0,), parents=(3,), probs=()))
        return tree

    def submit(self) -> None:
        prompt, output = expected()[key := self.rng.choice(list(expected()))]
        max_tokens, generated = self.rng.randint(1, LONGEST), 0
        if self.rng.random() < 0.2:
            generated = self.rng.randrange(max_tokens)
        request = tiny_request(
            f"r{next(self.ids)}",
            (*prompt, *output[:generated]),
            max_tokens,
            sampling=Sampling(temperature=0.9, seed=key[0]) if key[1] else None,
            num_generated=generated,
            arrived_at=float(self.rng.choice([0, self.driver.engine.num_iterations])),
            cache_salt=self.rng.choice(["", "", "", "salt"]),
        )
        due_at = self.rng.choice([0.0, 1000.0 + self.rng.random()])
        if self.engine.submit(request, None, due_at) is None:
            self.wanted[request.request_id] = output[:max_tokens]

    def cancel(self) -> None:
        if self.engine.sequences:
            request_id = self.rng.choice(list(self.engine.sequences))
            chunk = self.engine.cancel(request_id)
            assert chunk is not None
            self.driver.streams.take([chunk])
            self.cancelled.add(request_id)

    def open_job(self) -> None:
        job_id = f"j{self.rng.randrange(3)}"
        self.engine.training.open(new_job(job_id, LoraSpec(rank=2), 0, self.decoder, self.engine.cache), lease=1)
        self.slices[job_id] = (0, 0)

    def close_job(self) -> None:
        if self.slices:
            job_id = self.rng.choice(list(self.slices))
            self.engine.training.close(job_id)
            del self.slices[job_id]

    def train(self) -> None:
        open_jobs = [job_id for job_id in self.slices if self.engine.training.lease(job_id) is not None]
        if not open_jobs:
            return
        job_id = self.rng.choice(open_jobs)
        step, index = self.slices[job_id]
        tokens = random_prompt(self.rng.randint(2, 16), seed=self.rng.randrange(100))
        weight = 3e38 if self.rng.random() < 0.05 else self.rng.choice([0.0, 0.1])
        ends_step = self.rng.random() < 0.5
        item = TrainingSlice(
            job_id=job_id,
            lease=1,
            step=step,
            index=index,
            tokens=tokens,
            weights=(0.0, *[weight] * (len(tokens) - 1)),
            optimizer=OptimizerStep(learning_rate=1e-3) if ends_step else None,
        )
        try:
            self.engine.training.accept(item)
        except TooManySlicesError:
            return
        self.slices[job_id] = (step + 1, 0) if ends_step else (step, index + 1)

    def step(self) -> None:
        self.driver.step()
        self.check()

    def check(self) -> None:
        pages = self.engine.pages
        tables = [sequence.table for sequence in self.engine.sequences.values()]
        tables += [entry.table for entry in self.engine.training._entries.values()]
        held = Counter(itertools.chain.from_iterable(table.pages for table in tables))
        check_partition(pages, held)
        for sequence in self.engine.sequences.values():
            assert sequence.num_computed <= len(sequence.table.pages) * pages.page_size
            assert sequence.num_uncomputed >= 1
            assert sequence.table.num_taken <= sequence.table.num_published <= sequence.num_computed // pages.page_size
        for table in tables:
            for page in table.pages[table.num_published :]:
                assert held[page] == 1, "what may be written into is shared"
                assert page not in pages._digest_of, "what may be written into can be taken over"
        for entry in self.engine.training._entries.values():
            assert entry.table.num_published == 0

    def run(self, num_rounds: int) -> None:
        events = [self.submit] * 8 + [self.cancel, self.open_job, self.close_job] + [self.train] * 4 + [self.step] * 12
        for _ in range(num_rounds):
            self.rng.choice(events)()

    def settle(self) -> None:
        for job_id in list(self.slices):
            if self.rng.random() < 0.5:
                self.engine.training.close(job_id)
        num_left = 0
        while self.engine.has_work:
            self.step()
            num_left += 1
            assert num_left < 1500, "the engine does not come to an end"
        self.engine.training.close_all()
        pages = self.engine.pages
        assert pages.num_free == pages.num_pages
        assert pages.num_allocated == pages.num_freed
        assert set(self.driver.streams.ends) == set(self.wanted)
        for request_id, tokens in self.wanted.items():
            self.check_outcome(request_id, tokens)

    def check_outcome(self, request_id: str, tokens: list[int]) -> None:
        got, end = self.driver.streams.tokens[request_id], self.driver.streams.ends[request_id]
        assert end.usage is not None
        output = tokens[end.usage.completion_tokens - len(got) :]
        if request_id in self.cancelled:
            assert got == output[: len(got)]
        else:
            assert (got, end.finish_reason) == (output, "length")


POOLS: dict[str, dict[str, Any]] = {
    "roomy": {"num_pages": 96},
    "tight": {"num_pages": 24},
    "tiny": {"num_pages": 18},
    "narrow": {"num_pages": 20, "limits": Limits(max_batch_tokens=11, min_prefill_tokens=4)},
    "odd pages": {"num_pages": 13, "page_size": 7, "limits": Limits(max_batch_tokens=30, min_prefill_tokens=4)},
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pool", POOLS)
def test_a_storm_of_requests_and_jobs(pool: str, seed: int) -> None:
    storm = Storm(seed, **POOLS[pool])
    storm.run(400)
    storm.settle()
    counters = storm.engine.counters
    assert len(storm.wanted) > 40
    assert counters["finetune_tokens"] > 0
    assert counters["accepted_tokens"] > 20
    assert counters["prefix_cache_hits"] > 100
    assert pool == "roomy" or counters["preemptions"] > 5
