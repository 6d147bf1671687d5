"""Cached pages: the allocator beside a plain account of it, and who may have which pages when they are shared and short."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence as Seq

import pytest

from common.prefix import PageDigests
from services.executor.assembly import Assembly
from services.executor.pages import PageAllocator, PageTable
from services.executor.sequences import Sequence
from tests.test_executor_pages import check_partition
from tests.test_executor_preemption import plan_of
from tests.tiny import random_prompt, tiny_request

PAGE_SIZE = 4
PROMPT = random_prompt(33)

# --- the allocator ----------------------------------------------------------------------------------------------------


class Pool:
    """An allocator beside a plain account of what it should hold: which tokens each page was written for, and in which order
    the cached ones were last used."""

    def __init__(self, seed: int, num_pages: int) -> None:
        self.rng = random.Random(seed)
        self.pages = PageAllocator(num_pages, PAGE_SIZE)
        self.users: list[tuple[PageTable, list[int], PageDigests]] = []
        self.content: dict[int, tuple[int, ...]] = {}
        self.last_used: list[int] = []
        self.counts: Counter[str] = Counter()

    def join(self) -> None:
        """A new table takes over what is cached of a random text of few words."""
        words = [self.rng.randrange(2) for _ in range(6)]
        tokens = [word for word in words for _ in range(PAGE_SIZE)][: self.rng.randint(1, 24)]
        salt = self.rng.choice(["", "salt"])
        user = (self.pages.table(), tokens, PageDigests(PAGE_SIZE, 0, salt))
        while (place := len(user[0].pages)) < len(tokens) // PAGE_SIZE and self.pages.take(user[0], user[2].at(place, tokens)):
            page = user[0].pages[-1]
            assert self.content[page] == (*salt.encode(), *tokens[: (place + 1) * PAGE_SIZE]), "a page of another text"
            if page in self.last_used:
                self.last_used.remove(page)
            self.counts["taken"] += 1
        self.users.append(user)

    def grow(self) -> None:
        """A table computes all of its text and publishes the full pages."""
        if not self.users:
            return
        table, tokens, digests = self.rng.choice(self.users)
        missing, num_empty = self.pages.missing(table, len(tokens)), len(self.pages._free)
        if missing > self.pages.num_free:
            return
        expected = self.last_used[: max(0, missing - num_empty)]
        first = len(table.pages)
        self.pages.reserve(table, len(tokens))
        assert table.pages[first + min(missing, num_empty) :] == expected, "free pages first, then the least recently used"
        del self.last_used[: len(expected)]
        self.counts["evicted"] += len(expected)
        salt = "salt" if digests._root == PageDigests(PAGE_SIZE, 0, "salt")._root else ""
        for place in range(table.num_published, len(tokens) // PAGE_SIZE):
            self.content[table.pages[place]] = (*salt.encode(), *tokens[: (place + 1) * PAGE_SIZE])
            self.pages.publish(table, digests.at(place, tokens))

    def leave(self) -> None:
        """A table gives its pages back, now and then because they went bad."""
        if not self.users:
            return
        table, _, _ = self.users.pop(self.rng.randrange(len(self.users)))
        held = Counter(page for other, _, _ in self.users for page in other.pages)
        is_sound = self.rng.random() < 0.9
        if is_sound:
            kept = (page for page in reversed(table.pages) if page in self.pages._digest_of and not held[page])
            self.last_used += kept
        self.pages.release(table, is_sound=is_sound)

    def check(self) -> None:
        """All pages are where they belong, in their order."""
        check_partition(self.pages, Counter(page for table, _, _ in self.users for page in table.pages))
        assert list(self.pages._cached) == self.last_used
        for table, _, _ in self.users:
            for page in table.pages[table.num_published :]:
                assert page not in self.pages._digest_of
                assert self.pages._num_references[page] == 1


@pytest.mark.parametrize("seed", range(3))
def test_pages_are_free_cached_or_held_whatever_happens(seed: int) -> None:
    pool = Pool(seed, num_pages=30)
    for _ in range(3000):
        pool.rng.choice((pool.join, pool.grow, pool.grow, pool.leave))()
        pool.check()
        if len(pool.users) > 12:
            pool.leave()
    assert pool.counts["taken"] > 300
    assert pool.counts["evicted"] > 300
    pool.pages.forget_all()
    for table, _, _ in pool.users:
        pool.pages.release(table)
    assert len(pool.pages._free) == pool.pages.num_free == 30
    assert not pool.pages.take(pool.pages.table(), PageDigests(PAGE_SIZE, 0, "")._root)


def test_a_digest_depends_on_all_tokens_so_far_on_the_adapter_and_on_the_salt() -> None:
    def digest(tokens: list[int], version: int = 0, salt: str = "") -> bytes:
        return PageDigests(2, version, salt).at(1, tokens)

    different = [
        digest([1, 2, 3, 4]), digest([0, 2, 3, 4]), digest([1, 2, 3, 5]), digest([3, 4, 1, 2]), digest([1, 2, 3, 4], 1),
        digest([1, 2, 3, 4], 11), digest([1, 2, 3, 4], 0, "a"), digest([1, 2, 3, 4], 0, "ab"), digest([1, 2, 3, 4], 1, "1"),
        digest([1, 2 + 3 * 2**40, 3, 4]),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert {len(each) for each in different} == {32}
    assert digest([1, 2, 3, 4, 9]) == different[0]


# --- short of pages ----------------------------------------------------------------------------------------------------


def sequence_of(name: str, tokens: Seq[int], pages: PageAllocator, arrived_at: float, *, salt: str = "") -> Sequence:
    request = tiny_request(name, tokens, 5, arrived_at=arrived_at)
    return Sequence(
        request=request,
        tokens=list(tokens),
        table=pages.table(),
        adapter=None,
        stop_ids=frozenset(),
        first_token_due_at=None,
        num_output=0,
        digests=PageDigests(pages.page_size, 0, salt),
    )


def computed(sequence: Sequence, num_tokens: int, pages: PageAllocator) -> Sequence:
    """The sequence with this many tokens computed and published."""
    sequence.take_over(pages)
    pages.reserve(sequence.table, num_tokens)
    sequence.num_computed = num_tokens
    sequence.publish(pages)
    return sequence


def test_a_shared_page_is_obtainable_only_when_nobody_older_holds_it() -> None:
    pages = PageAllocator(10, PAGE_SIZE)
    old = computed(sequence_of("old", PROMPT, pages, 1.0), 16, pages)
    middle = computed(sequence_of("middle", (*PROMPT[:16], *random_prompt(20, seed=3)), pages, 2.0), 22, pages)
    young = computed(sequence_of("young", middle.tokens[:23], pages, 3.0), 22, pages)
    assert old.table.pages == middle.table.pages[:4] == young.table.pages[:4]
    assert middle.table.pages[4] == young.table.pages[4] != middle.table.pages[5]
    assert pages.num_free == 10 - (4 + 2 + 1)
    assembly = Assembly(pages)
    assembly.runnable([young, middle, old])
    assert len(assembly._spare(old)) == 3
    assert assembly._spare(middle) == {young.table.pages[5]}
    assert assembly._spare(young) == set()
    works = assembly.work(plan_of(old=16), [young, middle, old])
    assert [len(work.segment.tokens) for work in works] == [16]
    assert (young.table.pages, middle.num_computed) == ([], 22), "one page more was all that it took"
    assert assembly.num_preemptions == 1


def test_nobody_is_preempted_for_pages_that_stay_with_others() -> None:
    pages = PageAllocator(6, PAGE_SIZE)
    old = computed(sequence_of("old", PROMPT, pages, 1.0), 16, pages)
    middle = computed(sequence_of("middle", random_prompt(30, seed=3), pages, 2.0), 8, pages)
    young = sequence_of("young", PROMPT, pages, 3.0)
    young.take_over(pages)
    assert (pages.num_free, young.num_computed) == (0, 16)
    assembly = Assembly(pages)
    assert assembly.runnable([old, middle, young]) == [old], "middle has no room for a token, young none for all of its own"
    assert (young.num_computed, young.table.pages) == (0, []), "it waits, and holds nothing meanwhile"
    young.take_over(pages)
    (work,) = assembly.work(plan_of(old=6), [old, middle, young])
    assert (work.sequence, len(work.segment.tokens)) == (old, 6)
    assert (middle.num_computed, young.num_computed, assembly.num_preemptions) == (0, 16, 1)


def test_a_waiting_sequence_needs_room_only_for_what_older_ones_do_not_hold() -> None:
    pages = PageAllocator(11, PAGE_SIZE)
    old = computed(sequence_of("old", PROMPT, pages, 1.0), 33, pages)
    other = sequence_of("other", PROMPT, pages, 2.0, salt="other")
    same = sequence_of("same", PROMPT, pages, 3.0)
    assert Assembly(pages).runnable([other, same, old]) == [old, same]
    assert (same.num_computed, same.num_uncomputed, other.table.pages) == (32, 1, [])
