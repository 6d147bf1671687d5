"""The modes of speculation, each by what it alone does, and how they are spelled."""

from __future__ import annotations

import pytest

from common.config import ConfigError, load_config
from common.messages import LatencyProfile
from services.cli.parser import build_parser
from services.planner.config import PlannerConfig
from services.planner.mixed import MixedDrafter
from services.planner.modes import MODES
from services.planner.pacing import FIRST_TRIAL
from services.planner.planner import Planner, Shape
from tests.test_planner_mixed import TableDrafter
from tests.test_planner_sequences import opened, planner, progress, report

STEEP = LatencyProfile(points=((1, 30.0), (2, 60.0), (256, 7680.0)))


def test_adaserve_spends_the_budget_where_heddle_stops() -> None:
    arguments = report(1, new=(opened(),), latency=STEEP)
    assert planner().answer(arguments, 0.0) == ()
    (tree,) = planner(mode="adaserve").answer(arguments, 0.0)
    assert len(tree.tokens) > 5


@pytest.mark.parametrize(("mode", "learns"), [("heddle", True), ("adaserve", False)])
def test_heddle_learns_from_rejected_drafts_and_adaserve_takes_probabilities_raw(mode: str, learns: bool) -> None:
    ours = planner(mode=mode)
    (first,) = ours.answer(report(0, new=(opened(),)), 0.0)
    for i in range(1, FIRST_TRIAL - 2, 2):
        ours.answer(report(i, done=(progress((7777,), 2),)), 0.0)
        (last,) = ours.answer(report(i + 1, new=(opened(),)), 0.0)
    assert (last.probs[1] < 0.5 * first.probs[1]) is learns
    assert (last.probs[1] == first.probs[1]) is not learns


def test_how_badly_a_request_is_guessed_cuts_only_drafts_that_cost_time() -> None:
    """Both drafters guess chains, which are never right."""
    chain = {tuple(range(900, 900 + depth)): {900 + depth: 0.4} for depth in range(8)}
    free, costly = TableDrafter(chain), TableDrafter(chain)
    free.is_free = True
    shape = Shape(min_depth=2, max_depth=8, max_width=3, draft_tokens=96, depth_offset=0.0, width_offset=0, min_prob=0.02)
    ours = Planner(MixedDrafter([free, costly]), MODES["heddle"], shape)
    ours.answer(report(0, new=(opened(),)), 0.0)
    assert (free.asked[-1].depth, costly.asked[-1].depth) == (8, 8)
    for i in range(1, FIRST_TRIAL - 2):
        ours.answer(report(i, done=(progress((7777,), i + 1),)), 0.0)
    assert free.asked[-1].depth == 8
    assert costly.asked[-1].depth <= 2


def test_mode_none_never_drafts() -> None:
    ours = planner(mode="none")
    assert ours.answer(report(1, new=(opened(),)), 0.0) == ()
    assert ours.counters["reports"] == 1


def test_a_chain_is_one_path_of_so_many_tokens_for_every_request() -> None:
    new = tuple(opened(str(i)) for i in range(3))
    for budget, length in ((16, 4), (7, 2), (2, 0)):
        drafted = planner(mode="chain:4").answer(report(1, new=new, budget=budget, latency=STEEP), 0.0)
        assert [tree.parents for tree in drafted] == [tuple(range(-1, length))] * (3 if length else 0)


def test_equal_trees_have_one_size_whatever_the_targets() -> None:
    new = (opened("a", tpot_ms=1.0), opened("b"), opened("c"))
    drafted = planner(mode="equal").answer(report(1, new=new, budget=17, latency=STEEP), 0.0)
    assert [(len(tree.tokens) - 1, tree.num_required) for tree in drafted] == [(5, 0)] * 3


def test_a_debt_counts_the_time_of_the_nodes_that_pay_it() -> None:
    """30 ms alone, 1 ms a node: for 13 ms a token, 2.3 tokens are due in 30 ms, and 2.5 in the 33 that they take."""
    slow = LatencyProfile(points=((1, 30.0), (2, 31.5), (256, 412.5)))
    (tree,) = planner(mode="slo").answer(report(1, new=(opened(tpot_ms=13.0),), latency=slow), 0.0)
    expected = sum(tree.probs)
    pass_ms = 30.0 + 1.5 * (len(tree.tokens) - 1)
    assert expected >= pass_ms / 13.0
    assert expected - tree.probs[-1] < pass_ms / 13.0


@pytest.mark.parametrize("mode", ["chain:0", "chain:x", "chain:65", "chain:", "chain:-1", "chain:4.5", "tree", "", "HEDDLE"])
def test_modes_that_do_not_exist_are_refused_with_those_that_do(mode: str) -> None:
    with pytest.raises(ConfigError, match=r"mode must be .* chain:K with K from 1 to 64, not"):
        load_config(PlannerConfig, "planner", {"HEDDLE_PLANNER_MODE": mode})
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["up", "--speculation", mode])
    assert ended.value.code == 2
    assert build_parser().parse_args(["up", "--speculation", "chain:64"]).speculation == "chain:64"


def test_an_unknown_mode_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"mode must be heddle, .*, equal, none or chain:K"):
        load_config(PlannerConfig, "planner", {"HEDDLE_PLANNER_MODE": "fast"})
