"""Several drafters in one tree: same path, same node; calibrated by what the target accepts, however wrong they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from common.config import ConfigError
from common.drafts import DraftSpec, parse_drafts
from services.planner.calibration import Calibration, Reliability
from services.planner.drafter import Drafter, DraftOrder, Key, Pool
from services.planner.mixed import SURE, MixedDrafter

KEY: Key = ("executor", "request")
Fork = dict[int, float]


class TableDrafter:
    """Drafts what a table says of each path: its next tokens and their conditional probabilities."""

    def __init__(self, table: dict[tuple[int, ...], Fork]) -> None:
        self.is_free = False
        self.table = table
        self.seen: list[tuple[str, tuple[int, ...], str, bytes]] = []
        self.asked: list[DraftOrder] = []

    def open(self, key: Key, tokens: Sequence[int], *, tenant: str = "", features: bytes = b"") -> None:
        self.seen.append(("open", tuple(tokens), tenant, features))

    def extend(self, key: Key, tokens: Sequence[int], *, features: bytes = b"") -> None:
        self.seen.append(("extend", tuple(tokens), "", features))

    def close(self, key: Key) -> None:
        self.seen.append(("close", (), "", b""))

    def draft(self, orders: Sequence[DraftOrder]) -> list[Pool]:
        self.asked += orders
        return [self._pool(order.depth) for order in orders]

    def _pool(self, max_depth: int) -> Pool:
        pool, paths = Pool(), [(-1, tuple[int, ...](), 1.0)]
        for depth in range(1, max_depth + 1):
            paths = [
                (pool.add(token, parent, depth, above * prob), (*path, token), above * prob)
                for parent, path, above in paths
                for token, prob in self.table.get(path, {}).items()
            ]
        return pool


def mixed(*drafters: Drafter, is_frozen: bool = False) -> MixedDrafter:
    ours = MixedDrafter(drafters, is_frozen=is_frozen)
    ours.open(KEY, [1])
    return ours


def paths(pool: Pool) -> dict[tuple[int, ...], float]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(pool.tokens, pool.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    assert len(set(found)) == len(found), "a path is there twice"
    return dict(zip(found, pool.probs, strict=True))


def random_table(rng: np.random.Generator, max_depth: int) -> dict[tuple[int, ...], Fork]:
    table: dict[tuple[int, ...], Fork] = {}
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(max_depth):
        for path in frontier:
            tokens = rng.choice(5, int(rng.integers(0, 4)), replace=False).tolist()
            table[path] = {token: float(rng.uniform(0.02, 0.6)) for token in tokens}
        frontier = [(*path, token) for path in frontier for token in table[path]]
    return table


@pytest.mark.parametrize("seed", range(15))
def test_a_mix_holds_every_path_of_every_drafter_once_in_bfs_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drafters = [TableDrafter(random_table(rng, 4)) for _ in range(int(rng.integers(1, 4)))]
    (pool,) = mixed(*drafters).draft([DraftOrder(KEY, 4, 3)])
    single = [paths(drafter._pool(4)) for drafter in drafters]
    assert paths(pool).keys() == set().union(*single)
    assert pool.parents == sorted(pool.parents)
    children: dict[int, float] = {}
    for node, parent in enumerate(pool.parents):
        above = pool.probs[parent] if parent >= 0 else 1.0
        assert parent < node
        assert pool.depths[node] == (pool.depths[parent] + 1 if parent >= 0 else 1)
        assert 0 < pool.probs[node] < above
        children[parent] = children.get(parent, 0.0) + pool.probs[node]
    assert all(total <= 0.99 * (pool.probs[parent] if parent >= 0 else 1.0) + 1e-12 for parent, total in children.items())


def test_probabilities_of_a_mix_are_combined_along_the_path() -> None:
    ours = mixed(TableDrafter({(): {1: 0.5, 2: 0.2}, (1,): {3: 0.4}}), TableDrafter({(): {1: 0.4}, (1,): {4: 0.1}}))
    (pool,) = ours.draft([DraftOrder(KEY, 2, 3)])
    assert paths(pool) == pytest.approx({(1,): 0.7, (2,): 0.2, (1, 3): 0.7 * 0.4, (1, 4): 0.7 * 0.1})


def test_only_drafters_that_cost_nothing_draft_for_the_free_tier() -> None:
    free, costly = TableDrafter({(): {1: 0.5}}), TableDrafter({(): {1: 0.4, 2: 0.2}})
    free.is_free = True
    ours = mixed(free, costly)
    assert ours.has_tiers
    assert not mixed(costly).has_tiers
    (pool,) = ours.draft([DraftOrder(KEY, 2, 3)], "free")
    assert paths(pool) == pytest.approx({(1,): 0.5})
    (pool,) = ours.draft([DraftOrder(KEY, 2, 3)], "all")
    assert paths(pool) == pytest.approx({(1,): 0.7, (2,): 0.2})


def test_drafters_that_cost_time_have_limits_of_their_own_and_are_not_asked_where_others_are_sure() -> None:
    """Of two sequences the first goes on as the free drafter says."""
    free, costly = (TableDrafter({(): {1: prob}, (1,): {2: 0.5}, (1, 2): {3: 0.5}}) for prob in (0.9, 0.6))
    free.is_free = True
    ours = mixed(costly, free)
    orders, shallow = [DraftOrder(KEY, 3, 3)], [DraftOrder(KEY, 1, 1)]
    (pool,) = ours.draft(orders, "all", shallow)
    assert paths(pool) == pytest.approx({(1,): 0.9, (1, 2): 0.45, (1, 2, 3): 0.225})
    assert ours.computed == []
    (pool,) = ours.draft(orders, "all")
    assert paths(pool)[1,] == pytest.approx(0.96)
    assert [pool.depths for pool in ours.computed] == [[1, 2, 3]]
    (pool,) = ours.draft(orders, "all", shallow, needy=[0])
    assert paths(pool)[1,] == pytest.approx(0.96), "it is in debt"
    unsure = TableDrafter({(): {1: SURE - 0.1}, (1,): {2: 0.5}})
    unsure.is_free = True
    ours = mixed(costly, unsure)
    (pool,) = ours.draft(orders, "all", shallow)
    either = 1 - (1 - 0.6) * (1 - (SURE - 0.1))
    assert paths(pool) == pytest.approx({(1,): either, (1, 2): either / 2}), "the costly drafter told of one level"
    assert [pool.depths for pool in ours.computed] == [[1]]
    ours.draft(orders, "free")
    assert [pool.depths for pool in ours.computed] == [[1, 2]]


def test_tokens_tenants_and_features_reach_every_drafter() -> None:
    drafters = [TableDrafter({}), TableDrafter({})]
    ours = MixedDrafter(drafters)
    ours.open(KEY, [1, 2], tenant="t", features=b"f")
    ours.extend(KEY, [3], features=b"g")
    ours.close(KEY)
    ours.close(KEY)
    for drafter in drafters:
        assert drafter.seen == [("open", (1, 2), "t", b"f"), ("extend", (3,), "", b"g"), ("close", (), "", b"")]
    with pytest.raises(KeyError):
        ours.extend(KEY, [4])


class Stream:
    """Drafters that are badly wrong about a synthetic target: each has a chain of its own, with probabilities of their own.

    The first is far too sure of itself (odds times 20, certainly at times), the second far too shy (odds over 8); where they
    agree they are right more often than either alone, and depth changes everything.
    """

    def __init__(self, seed: int, num_drafters: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.drafters = [TableDrafter({}) for _ in range(num_drafters)]
        self.ours = MixedDrafter(self.drafters)
        self.ours.open(KEY, [0])
        self.num_verified = 0

    def step(self) -> None:
        rng, depth = self.rng, 6
        truth = tuple(rng.integers(4, size=depth).tolist())
        for i, drafter in enumerate(self.drafters):
            drafter.table, path = {}, tuple[int, ...]()
            for level in range(depth):
                skill = float(rng.beta(2, 2)) * (0.6 if level < 2 else 0.95)
                is_right = path == truth[:level] and rng.random() < skill
                odds = skill / (1 - skill) * (20.0 if i == 0 else 1 / 8)
                token = truth[level] if is_right else (truth[level] + int(rng.integers(1, 4))) % 4
                drafter.table[path] = {token: odds / (1 + odds)}
                path = (*path, token)
        (pool,) = self.ours.draft([DraftOrder(KEY, depth, 3)])
        self.ours.choose(KEY, range(len(pool)))
        self.num_verified += len(pool)
        known = set(paths(pool))
        num_right = next(n for n in range(depth, -1, -1) if n == 0 or truth[:n] in known)
        self.ours.extend(KEY, [*truth, 9][: num_right + 1])


@pytest.mark.parametrize("num_drafters", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_after_2000_verified_nodes_predictions_are_reliable_within_5_percent(seed: int, num_drafters: int) -> None:
    stream = Stream(seed, num_drafters)
    while stream.num_verified < 2000:
        stream.step()
    stream.ours.reliability = Reliability()
    frozen = Stream(seed, num_drafters)
    frozen.ours = MixedDrafter(frozen.drafters, is_frozen=True)
    frozen.ours.open(KEY, [0])
    for _ in range(400):
        stream.step()
        frozen.step()
    assert stream.ours.reliability.error < 0.05
    assert frozen.ours.reliability.error > 0.15, "the raw probabilities are not wrong enough to prove anything"


def test_frozen_probabilities_do_not_move() -> None:
    ours = mixed(TableDrafter({(): {1: 0.5}}), is_frozen=True)
    for _ in range(50):
        assert ours.draft([DraftOrder(KEY, 1, 1)])[0].probs == [0.5]
        ours.extend(KEY, [2])


def test_corrections_follow_a_change_and_stay_inside_0_and_1() -> None:
    calibration = Calibration(forgetting=0.99)
    for is_hit, low, high in ((True, 0.9, 1.0), (False, 0.0, 0.1)):
        for _ in range(1000):
            calibration.observe(0.4, 1, is_hit)
        assert low < calibration.probability(0.4, 1) < high
    assert calibration.probability(0.4, 1) < calibration.probability(0.45, 1), "order stays"
    assert calibration.probability(0.7, 1) == pytest.approx(0.7), "other probabilities were not observed"
    assert 0 < calibration.probability(0.0, 99) < calibration.probability(1.0, 99) < 1


def test_the_reliability_error_by_hand() -> None:
    reliability = Reliability(forgetting=1.0)
    assert reliability.error == 0
    reliability.observe([0.95, 0.95, 0.12, 0.18], [True, False, False, False])
    assert reliability.error == pytest.approx((abs(1.9 - 1) + 0.3) / 4)


def test_only_nodes_whose_fate_is_known_are_judged() -> None:
    """A tree that was cut on its way tells nothing of what was cut off below the right path."""
    ours = mixed(TableDrafter({(): {1: 0.5}, (1,): {2: 0.5}}))
    ours.draft([DraftOrder(KEY, 2, 1)])
    ours.choose(KEY, [0, 1])
    ours.extend(KEY, [1])
    assert ours.reliability.error == pytest.approx(0.5), "of the first node alone, which was right"


def test_drafts_are_parsed_and_refused_by_part() -> None:
    assert parse_drafts("ngram, features:/a/b") == (DraftSpec("ngram"), DraftSpec("features", "/a/b"))
    assert str(parse_drafts("model:C:/x")[0]) == "model:C:/x"
    for bad in ("", "ngram,", "model", "features:", "ngram:x", "eagle:x", "ngram,ngram", "ngram,model:a,model:b,model:c"):
        with pytest.raises(ConfigError, match="draft must"):
            parse_drafts(bad)
