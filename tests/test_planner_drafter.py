"""The n-gram drafter: what it finds, how sure it is, and what it costs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from services.planner.drafter import DraftOrder, Key, Pool
from services.planner.ngram import END, LEVELS, NgramDrafter, NgramIndex, Traffic

KEY: Key = ("executor", "request")


def drafter(**options: Any) -> NgramDrafter:
    return NgramDrafter(**options)


def draft(tokens: list[int], depth: int = 8, width: int = 3, **options: float) -> Pool:
    ours = drafter(**options)
    ours.open(KEY, tokens)
    (pool,) = ours.draft([DraftOrder(KEY, depth, width)])
    return pool


def path(pool: Pool, node: int) -> list[int]:
    tokens = []
    while node >= 0:
        tokens.append(pool.tokens[node])
        node = pool.parents[node]
    return tokens[::-1]


def naive_matches(tokens: list[int], max_match: int) -> dict[int, int]:
    """Every earlier end of the sequence's last token, with the length of the match there."""
    last, found = len(tokens) - 1, {}
    for end in range(last):
        length = 0
        while length < max_match and end >= length and tokens[end - length] == tokens[last - length]:
            length += 1
        if length:
            found[end] = length
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_index_finds_what_a_scan_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens: list[int] = rng.integers(0, 4, int(rng.integers(1, 60))).tolist()
    index = NgramIndex(tokens[: len(tokens) // 2])
    for token in tokens[len(tokens) // 2 :]:
        index.extend([token])
    found = index.matches(limit=1000, max_match=9)
    assert dict(found) == naive_matches(tokens, 9)
    grades = [sum(length >= level for level in LEVELS) for _, length in found]
    assert grades == sorted(grades, reverse=True), "long matches first"
    assert dict(index.matches(limit=3, max_match=9)).items() <= dict(found).items()


def test_repeated_text_gives_a_long_likely_draft() -> None:
    text = list(range(100, 140))
    pool = draft(text + text[:20], depth=12)
    assert path(pool, len(pool) - 1) == text[20:32]
    assert pool.probs[-1] > 0.5


def test_a_loop_is_drafted_beyond_the_text_it_was_seen_in() -> None:
    pool = draft([9, 1, 2, 1, 2, 1, 2], depth=8)
    deepest = pool.depths.index(8)
    assert path(pool, deepest) == [1, 2, 1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("tokens", [[1], [1, 2], list(range(50))])
def test_unseen_text_gives_no_draft(tokens: list[int]) -> None:
    assert len(draft(tokens)) == 0


def test_longer_and_more_recent_matches_weigh_more() -> None:
    recent = draft([7, 1, 8, 7, 2, 9, 7], depth=1)
    assert dict(zip(recent.tokens, recent.probs, strict=True))[2] > dict(zip(recent.tokens, recent.probs, strict=True))[1]
    longer = draft([4, 5, 6, 1, 0, 6, 2, 4, 5, 6], depth=1)
    assert dict(zip(longer.tokens, longer.probs, strict=True))[1] > dict(zip(longer.tokens, longer.probs, strict=True))[2]


def test_all_children_of_the_beams_are_candidates() -> None:
    tokens = [t for i in range(5) for t in (7, 10 + i, 20 + i)] + [7]
    pool = draft(tokens, depth=2, width=2, min_prob=1e-6)
    assert sorted(pool.tokens[: pool.depths.count(1)]) == [10, 11, 12, 13, 14]
    assert len({parent for parent in pool.parents if parent >= 0}) == 2, "two beams go on"


@pytest.mark.parametrize("seed", range(20))
def test_pools_are_trees_whose_probabilities_fall_along_paths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = draft(rng.integers(0, 3, 80).tolist(), depth=6, min_prob=1e-4)
    assert len(pool) > 0
    assert max(pool.depths) <= 6
    children: dict[int, float] = {}
    for node, parent in enumerate(pool.parents):
        above = pool.probs[parent] if parent >= 0 else 1.0
        assert parent < node
        assert pool.depths[node] == (pool.depths[parent] + 1 if parent >= 0 else 1)
        assert 0 < pool.probs[node] < above <= 1
        children[parent] = children.get(parent, 0.0) + pool.probs[node]
    assert pool.parents == sorted(pool.parents)
    assert all(total <= (pool.probs[parent] if parent >= 0 else 1.0) + 1e-12 for parent, total in children.items())
    assert len(set(zip(pool.parents, pool.tokens, strict=True))) == len(pool)


def test_unlikely_nodes_are_no_candidates() -> None:
    tokens = [t for i in range(8) for t in (7, 10 + i)] + [7]
    assert min(draft(tokens, min_prob=0.05).probs) >= 0.05
    assert len(draft(tokens, min_prob=0.05)) < len(draft(tokens, min_prob=0.001))


def test_depth_zero_and_a_closed_sequence() -> None:
    assert len(draft([1, 1, 1], depth=0)) == 0
    ours = drafter()
    ours.open(KEY, [1, 1, 1])
    ours.close(KEY)
    ours.close(KEY)
    with pytest.raises(KeyError):
        ours.draft([DraftOrder(KEY, 1, 1)])


def test_what_is_committed_can_be_drafted_next() -> None:
    ours = drafter()
    ours.open(KEY, [1, 2, 3])
    ours.extend(KEY, [4, 1, 2])
    (pool,) = ours.draft([DraftOrder(KEY, 2, 3)])
    assert path(pool, len(pool) - 1) == [3, 4]


def test_an_iteration_costs_as_much_after_a_long_prompt_as_after_a_short_one() -> None:
    """Work per draft is bounded by the number of matches, not by the prompt."""
    rng = np.random.default_rng(2)
    ours = drafter()
    least = []
    for length in (200, 20_000):
        ours.open(KEY, rng.integers(0, 50, length).tolist())
        times = []
        for _ in range(50):
            start = time.thread_time()
            ours.extend(KEY, [7, 8])
            ours.draft([DraftOrder(KEY, 8, 3)])
            times.append(time.thread_time() - start)
        least.append(min(times))
    assert least[1] < 8 * least[0] + 1e-3


def test_ended_sequences_help_others_of_their_tenant_alone() -> None:
    """And one that goes on has told nothing yet."""
    ours = drafter(traffic=Traffic(1000))
    text = list(range(100, 120))
    for name, tokens, tenant in (("first", text, "a"), ("second", text[:5], "a"), ("other", text[:5], "b")):
        ours.open(("e", name), tokens, tenant=tenant)

    def drafts() -> dict[str, list[int]]:
        names = ("second", "other")
        pools = ours.draft([DraftOrder(("e", name), 4, 3) for name in names])
        return {name: pool.tokens for name, pool in zip(names, pools, strict=True)}

    assert drafts() == {"second": [], "other": []}
    ours.close(("e", "first"))
    assert drafts() == {"second": text[5:9], "other": []}


def test_a_draft_from_traffic_ends_where_its_text_ended() -> None:
    traffic = Traffic(1000)
    traffic.add("a", [1, 2, 3])
    traffic.add("a", [4, 5, 6])
    ours = drafter(traffic=traffic)
    ours.open(KEY, [9, 1, 2], tenant="a")
    (pool,) = ours.draft([DraftOrder(KEY, 8, 3)])
    assert pool.tokens == [3]


@pytest.mark.parametrize("seed", range(5))
def test_traffic_is_bounded_and_forgets_the_oldest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    traffic, last = Traffic(400), dict[str, list[int]]()
    for i in range(60):
        tenant, text = f"t{int(rng.integers(1, 5))}", rng.integers(0, 50, int(rng.integers(1, 200))).tolist()
        traffic.add(tenant, text)
        assert len(traffic) == sum(len(index.tokens) for t in range(1, 5) for index in traffic.of(f"t{t}")) <= 400
        last[tenant] = text[-100:]
        assert traffic.of(tenant)[0].tokens[-len(last[tenant]) - 1 :] == [*last[tenant], END], i
    Traffic(0).add("a", [1])


@pytest.mark.parametrize("seed", range(5))
def test_matches_in_another_text_are_those_of_a_scan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text, tail = rng.integers(0, 4, 60).tolist(), rng.integers(0, 4, 7).tolist()
    joined = naive_matches([*text, END, *tail], 9)
    expected = {end: length for end, length in joined.items() if end < len(text)}
    assert dict(NgramIndex(text).matches_of(tail, 1000, 9)) == expected
