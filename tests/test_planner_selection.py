"""Selection: budget, closure and quotas as properties of random pools; optimality against brute force."""

from __future__ import annotations

import time
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from numpy.random import Generator

from common.latency import Rows, predict_ms
from common.messages import LatencyProfile
from services.planner.costs import Costs, iteration_costs
from services.planner.drafter import Pool
from services.planner.selection import Candidates, Demand, QuotaOrder, Selection, select, select_chains, select_equally
from services.planner.trees import cut, join, split
from tests.planner_trees import find_fault

UNLIMITED = 10**6
ORDERS: tuple[QuotaOrder, ...] = ("cheapest", "slowest")


def random_pool(rng: Generator, size: int, branching: int = 3) -> Pool:
    """A random tree in BFS order; siblings and cousins are often equally probable, to provoke ties."""
    pool = Pool()
    num_children: Counter[int] = Counter()
    parent = -1
    for node in range(size):
        parent = int(rng.choice([p for p in range(parent, node) if num_children[p] < branching]))
        num_children[parent] += 1
        pool.tokens.append(node)
        pool.parents.append(parent)
        pool.depths.append(pool.depths[parent] + 1 if parent >= 0 else 1)
        pool.probs.append((pool.probs[parent] if parent >= 0 else 1.0) * float(rng.choice([0.5, rng.uniform(0.05, 0.99)])))
    return pool


def choose(
    pools: list[Pool],
    debt: list[float],
    budget: int,
    *,
    max_required: int = UNLIMITED,
    order: QuotaOrder = "cheapest",
    has_rest: bool = True,
    costs: Costs | None = None,
) -> Selection:
    most = np.full(len(pools), 100.0)
    demand = Demand(debt=np.array(debt, dtype=np.float64), most=most)
    return select(join(pools), demand, budget, max_required=max_required, order=order, has_rest=has_rest, costs=costs)


def costs_of(points: tuple[tuple[int, float], ...], base_tokens: int, budget: int, num_requests: int = 1) -> Costs:
    """Without a context, and no time but the pass."""
    profile = LatencyProfile(points=points)
    plain_ms = predict_ms(profile, Rows(base_tokens))
    return iteration_costs(profile, plain_ms, base_tokens, [0] * num_requests, budget)


def expected(pools: list[Pool], chosen: list[int]) -> list[float]:
    """Expected tokens per request, root included."""
    picked = split(chosen, pools)
    return [1 + sum(pool.probs[node] for node in nodes) for pool, nodes in zip(pools, picked, strict=True)]


def is_closed(pool: Pool, nodes: list[int]) -> bool:
    return all(pool.parents[node] in nodes or pool.parents[node] == -1 for node in nodes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(40))
def test_any_selection_is_trees_within_the_budget(seed: int, order: QuotaOrder) -> None:
    rng = np.random.default_rng(seed)
    pools = [random_pool(rng, int(rng.integers(0, 12))) for _ in range(int(rng.integers(1, 9)))]
    debt = [max(1.0, float(rng.uniform(-2, 8))) for _ in pools]
    budget = int(rng.integers(0, 40))
    costs = costs_of(((1, 10.0), (8, 11.0), (64, 30.0)), len(pools), budget, len(pools)) if seed % 2 else None
    result = choose(pools, debt, budget, max_required=int(rng.integers(1, 9)), order=order, costs=costs)
    assert len(result.chosen) <= budget
    assert len(set(result.chosen.tolist())) == len(result.chosen)
    if costs is None:
        assert len(result.chosen) == min(budget, sum(len(pool) for pool in pools))
    for pool, nodes, num_required in zip(pools, split(result.chosen.tolist(), pools), result.num_required, strict=True):
        assert is_closed(pool, nodes)
        assert num_required <= len(nodes)
        tree = cut(pool, nodes, request_id="r", root=7, length=3, num_required=int(num_required))
        assert find_fault(tree) is None


def closed_subsets(pool: Pool) -> list[tuple[int, float]]:
    """(size, expected tokens) of every ancestor-closed subset."""
    found = []
    for size in range(len(pool) + 1):
        for nodes in combinations(range(len(pool)), size):
            if is_closed(pool, list(nodes)):
                found.append((size, 1 + sum(pool.probs[node] for node in nodes)))
    return found


def best_by_brute_force(pools: list[Pool], debt: list[float], budget: int) -> float | None:
    """The most expected tokens of all trees that pay every debt within the budget; None if there are none."""
    best = None
    for choice in product(*(closed_subsets(pool) for pool in pools)):
        if sum(size for size, _ in choice) <= budget and all(
            gain >= owed - 1e-12 for (_, gain), owed in zip(choice, debt, strict=True)
        ):
            best = max(best or 0.0, sum(gain for _, gain in choice))
    return best


@pytest.mark.parametrize("order", ORDERS)
def test_selection_is_algorithm_1_on_small_trees(order: QuotaOrder) -> None:
    rng = np.random.default_rng(5)
    outcomes = {True: 0, False: 0}
    for _ in range(60):
        pools = [random_pool(rng, int(rng.integers(1, 6)), branching=2) for _ in range(3)]
        debt = [max(1.0, float(rng.uniform(0.5, 2.2))) for _ in pools]
        budget = int(rng.integers(0, 10))
        best = best_by_brute_force(pools, debt, budget)
        result = choose(pools, debt, budget, order=order)
        assert (result.num_unmet == 0) == (best is not None)
        outcomes[best is not None] += 1
        if best is not None:
            gains = expected(pools, result.chosen.tolist())
            assert sum(gains) == pytest.approx(best)
            assert all(gain >= owed - 1e-8 for gain, owed in zip(gains, debt, strict=True))
    assert min(outcomes.values()) > 5


def test_cheapest_order_pays_as_many_debts_as_brute_force_can() -> None:
    rng = np.random.default_rng(11)
    slowest_lost = 0
    for _ in range(60):
        pools = [random_pool(rng, 6) for _ in range(4)]
        debt = [float(rng.uniform(1.1, 2.5)) for _ in pools]
        budget = int(rng.integers(1, 12))
        costs = [
            min((size for size, gain in closed_subsets(p) if gain >= owed), default=99)
            for p, owed in zip(pools, debt, strict=True)
        ]
        most = max(count for count in range(5) for some in combinations(costs, count) if sum(some) <= budget)
        assert 4 - choose(pools, debt, budget).num_unmet == most
        slowest_lost += 4 - choose(pools, debt, budget, order="slowest").num_unmet < most
    assert slowest_lost > 5


def test_drafting_time_that_is_spent_anyway_makes_more_nodes_worth_it() -> None:
    profile = LatencyProfile(points=((1, 10.0), (64, 325.0)))
    counts = [
        len(choose([CHAIN], [1.0], 3, costs=iteration_costs(profile, 10.0 + wait_ms, 1, [0], 3)).chosen)
        for wait_ms in (0.0, 2.0, 20.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_nodes_behind_a_long_context_pay_less() -> None:
    profile = LatencyProfile(points=((1, 10.0), (64, 11.0)), ms_per_row_context=1e-3)
    costs = [iteration_costs(profile, 10.0, 1, [context], 3) for context in (10, 10_000)]
    assert [len(choose([CHAIN], [1.0], 3, costs=each).chosen) for each in costs] == [3, 0]


def test_equal_trees_are_the_best_nodes_of_each_request() -> None:
    rng = np.random.default_rng(6)
    pools = [random_pool(rng, size) for size in (12, 3, 0, 9)]
    for budget in (-1, 0, 3, 4, 17, 100):
        share = max(0, budget) // 4
        result = select_equally(join(pools), 4, budget)
        picked = split(result.chosen.tolist(), pools)
        assert [len(nodes) for nodes in picked] == [min(share, len(pool)) for pool in pools]
        for pool, nodes in zip(pools, picked, strict=True):
            assert is_closed(pool, nodes)
            best = sorted(pool.probs, reverse=True)[: len(nodes)]
            assert sorted((pool.probs[node] for node in nodes), reverse=True) == best
    assert select_equally(join([]), 0, 5).chosen.tolist() == []


def test_a_chain_follows_the_most_probable_child() -> None:
    tree = Pool(tokens=[1, 2, 3, 4, 5], parents=[-1, -1, 0, 1, 1], depths=[1, 1, 2, 2, 2], probs=[0.4, 0.5, 0.39, 0.2, 0.3])
    pools = [tree, Pool(), CHAIN]
    for length, expected_nodes in (
        (0, [[], [], []]),
        (1, [[1], [], [0]]),
        (2, [[1, 4], [], [0, 1]]),
        (9, [[1, 4], [], [0, 1, 2]]),
    ):
        result = select_chains([pool.parents for pool in pools], join(pools), length)
        assert split(result.chosen.tolist(), pools) == expected_nodes
        assert result.num_required.tolist() == [0, 0, 0]


def test_a_quota_never_shrinks_as_the_debt_grows() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        pools = [random_pool(rng, 12)]
        quotas = [int(choose(pools, [debt], 12).num_required[0]) for debt in np.linspace(1, 8, 50)]
        assert quotas == sorted(quotas)
        assert quotas[0] == 0
        assert quotas[-1] == 12


CHAIN = Pool(tokens=[5, 6, 7], parents=[-1, 0, 1], depths=[1, 2, 3], probs=[0.8, 0.6, 0.4])
STAR = Pool(tokens=[1, 2, 3], parents=[-1, -1, -1], depths=[1, 1, 1], probs=[0.5, 0.3, 0.1])


def test_the_papers_worked_example() -> None:
    """Figure 5, whose debts leave the root out: 0.6 and 0.8 there are 1.6 and 1.8 here; a budget of 8 holds 2 roots."""
    first = Pool(tokens=[1, 3, 4, 5], parents=[-1, 0, 0, 1], depths=[1, 2, 2, 3], probs=[0.7, 0.42, 0.2, 0.294])
    second = Pool(tokens=[1, 2, 3], parents=[-1, -1, 0], depths=[1, 1, 2], probs=[0.5, 0.4, 0.35])
    result = choose([first, second], [1.6, 1.8], 6)
    assert result.num_required.tolist() == [1, 2]
    assert split(result.chosen.tolist(), [first, second]) == [[0, 1, 3], [0, 1, 2]]


def test_the_root_counts_as_one_token() -> None:
    assert choose([CHAIN], [1.0], 0).num_unmet == 0
    assert choose([CHAIN], [1.0], 3).num_required.tolist() == [0]
    assert choose([CHAIN], [1.8], 3).num_required.tolist() == [1]
    assert choose([CHAIN], [1.81], 3).num_required.tolist() == [2]


def test_equal_and_nearly_equal_probabilities_leave_no_child_without_its_parent() -> None:
    """Probabilities are ranked to twelve digits; where two agree that far, the ancestor comes first."""
    prob, pool = np.float64(0.7), Pool()
    for node in range(60):
        pool.tokens.append(node)
        pool.parents.append(node - 1)
        pool.depths.append(node + 1)
        pool.probs.append(float(prob))
        prob = np.nextafter(prob, 0.0)
    for budget in range(0, 61, 7):
        chosen = choose([pool, pool], [1.0, 1.0], budget).chosen.tolist()
        assert all(is_closed(pool, nodes) for nodes in split(chosen, [pool, pool]))
        assert len(chosen) == budget


def test_no_requests_and_no_candidates_select_nothing() -> None:
    for result in (choose([], [], 5), choose([Pool(), Pool()], [3.0, 1.0], 5)):
        assert result.chosen.tolist() == []
    assert choose([Pool(), Pool()], [3.0, 1.0], 5).num_unmet == 1


def test_a_budget_below_the_number_of_requests_serves_some() -> None:
    result = choose([CHAIN] * 4, [1.5] * 4, 2)
    assert result.num_required.tolist() == [1, 1, 0, 0]
    assert result.num_unmet == 2
    assert choose([CHAIN] * 4, [1.5] * 4, -3).chosen.tolist() == []


def test_a_quota_beyond_the_pool_takes_the_pool() -> None:
    result = choose([STAR, CHAIN], [50.0, 1.0], 6)
    assert result.num_required.tolist() == [3, 0]
    assert result.num_unmet == 1


def test_a_quota_that_the_budget_does_not_cover_is_granted_in_part() -> None:
    assert choose([CHAIN, STAR], [2.4, 1.8], 3, order="slowest").num_required.tolist() == [2, 1]


def test_one_request_cannot_take_the_budget_of_all_for_its_slo() -> None:
    assert choose([CHAIN, STAR], [9.0, 1.5], 3, max_required=2, order="slowest").num_required.tolist() == [2, 1]


def test_the_cap_on_a_debt_is_what_an_iteration_can_yield() -> None:
    demand = Demand(debt=np.array([9.0]), most=np.array([1.5]))
    result = select(join([CHAIN]), demand, 3, max_required=9, order="cheapest")
    assert result.num_required.tolist() == [1]
    assert result.num_unmet == 1


def test_the_stop_rule_leaves_nodes_that_cost_more_than_they_bring() -> None:
    flat, steep = ((1, 10.0), (64, 10.1)), ((1, 10.0), (64, 640.0))
    assert len(choose([CHAIN], [1.0], 3, costs=costs_of(flat, 1, 3)).chosen) == 3
    assert len(choose([CHAIN], [1.0], 3, costs=costs_of(steep, 1, 3)).chosen) == 0
    assert len(choose([CHAIN], [2.4], 3, costs=costs_of(steep, 1, 3)).chosen) == 2, "debts are paid at any price"


def test_a_node_is_held_against_all_tokens_that_come_meanwhile() -> None:
    """One request takes 10 ms, and so does each of `num_others`; a node takes 4 ms more: worth it if it brings 4 tenths."""
    demand = Demand(debt=np.array([1.0]), most=np.array([9.0]))
    for prob in (0.39, 0.41):
        for num_others in range(5):
            costs = Costs(by_count=10.0 * (1 + num_others) + np.array([0.0, 4.0]), per_node=np.zeros(1))
            candidates = Candidates(owner=np.array([0]), prob=np.array([prob]))
            found = select(candidates, demand, 1, max_required=9, order="cheapest", num_others=num_others, costs=costs)
            assert len(found.chosen) == (prob > 0.4)


def test_without_the_rest_only_quotas_are_chosen() -> None:
    result = choose([CHAIN, STAR], [1.8, 1.0], 6, has_rest=False)
    assert split(result.chosen.tolist(), [CHAIN, STAR]) == [[0], []]


def test_without_quotas_debts_change_nothing_but_the_count_of_unmet_ones() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        pools = [random_pool(rng, 8) for _ in range(3)]
        indebted = choose(pools, [9.0, 3.0, 1.0], 7, max_required=0)
        probs = np.concatenate([pool.probs for pool in pools])
        assert indebted.num_required.tolist() == [0, 0, 0]
        assert probs[indebted.chosen].sum() == pytest.approx(np.sort(probs)[-7:].sum())


def test_the_stop_rule_finds_the_best_count_of_all() -> None:
    rng = np.random.default_rng(9)
    for _ in range(30):
        pools = [random_pool(rng, 8) for _ in range(3)]
        points = ((1, 10.0), (8, float(rng.uniform(10, 12))), (16, float(rng.uniform(12, 30))), (64, 80.0))
        costs = costs_of(points, 3, 24, 3)
        rates = []
        for budget in range(25):
            chosen = choose(pools, [1.0] * 3, budget).chosen.tolist()
            rates.append(sum(expected(pools, chosen)) / costs.by_count[budget])
        assert len(choose(pools, [1.0] * 3, 24, costs=costs).chosen) == int(np.argmax(rates))


def test_64_requests_with_64_candidates_each_are_selected_in_a_few_ms() -> None:
    rng = np.random.default_rng(1)
    candidates = join([random_pool(rng, 64) for _ in range(64)])
    demand = Demand(debt=rng.uniform(1, 6, 64), most=np.full(64, 9.0))
    profile = LatencyProfile(points=((1, 30.0), (512, 150.0)), ms_per_row_context=1e-4)
    times = []
    for _ in range(100):
        start = time.thread_time()
        costs = iteration_costs(profile, 40.0, 64, [500] * 64, 512)
        select(candidates, demand, 512, max_required=9, order="cheapest", costs=costs)
        times.append(time.thread_time() - start)
    assert min(times) < 0.004, "CPU time; 1 ms on an idle core, and a busy machine is slower"
