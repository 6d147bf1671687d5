"""The planner's core without a bus: it follows reports, survives lost ones, and drafts within limits."""

from __future__ import annotations

import itertools
import time

import pytest

from common.codec import decode, encode
from common.messages import (
    DraftTree,
    DraftTrees,
    IterationReport,
    LatencyProfile,
    OpenedSequence,
    SequenceProgress,
)
from services.planner.actor import make_planner
from services.planner.config import PlannerConfig
from services.planner.planner import Planner
from services.planner.sequences import MAX_UNKNOWN
from tests.planner_trees import find_fault

FLAT = LatencyProfile(points=((1, 30.0), (256, 31.0)))
COSTLY = LatencyProfile(points=((1, 30.0), (2, 40.0), (256, 2580.0)))
"""A node takes a third of what the roots take: beside three others, one for each ms brings less than they do."""
LOOP = (1, 2, 3, 4) * 10


def planner(**settings: object) -> Planner:
    """Drafting takes a millisecond, whatever the machine."""
    return make_planner(PlannerConfig(**settings), itertools.count(step=0.001).__next__)  # type: ignore[arg-type]


def opened(
    request_id: str = "r", *, num_output: int = 1, max_output: int = 100, tpot_ms: float | None = None
) -> OpenedSequence:
    return OpenedSequence(request_id=request_id, tokens=LOOP, num_output=num_output, max_output=max_output, tpot_ms=tpot_ms)


def others() -> tuple[OpenedSequence, ...]:
    """Three requests without targets, of which nothing can be guessed."""
    return tuple(
        OpenedSequence(request_id=f"other{i}", tokens=tuple(range(100 * i, 100 * i + 40)), num_output=1, max_output=100)
        for i in range(1, 4)
    )


def go_on(num_output: int) -> tuple[SequenceProgress, ...]:
    """One more token of each of them."""
    return tuple(progress((1000 * i + num_output,), num_output, f"other{i}") for i in range(1, 4))


def progress(tokens: tuple[int, ...], num_output: int, request_id: str = "r", decode_ms: float = 0.0) -> SequenceProgress:
    return SequenceProgress(
        request_id=request_id,
        tokens=tokens,
        num_drafted=4,
        accepted_len=len(tokens) - 1,
        num_output=num_output,
        decode_ms=decode_ms,
    )


def report(
    iteration: int,
    *,
    new: tuple[OpenedSequence, ...] = (),
    done: tuple[SequenceProgress, ...] = (),
    closed: tuple[str, ...] = (),
    budget: int = 16,
    executor_id: str = "e",
    t_spec_ms: float = 30.0,
    latency: LatencyProfile = FLAT,
) -> IterationReport:
    return IterationReport(
        executor_id=executor_id,
        iteration=iteration,
        opened=new,
        closed=closed,
        progress=done,
        token_budget=budget,
        base_tokens=1,
        t_spec_ms=t_spec_ms,
        latency=latency,
    )


def test_a_tree_continues_the_sequence_from_its_last_committed_token() -> None:
    (tree,) = planner().answer(report(1, new=(opened(),)), 0.0)
    assert find_fault(tree) is None
    assert (tree.request_id, tree.length, tree.tokens[0], tree.probs[0]) == ("r", 40, 4, 1.0)
    assert tree.tokens[1:5] == (1, 2, 3, 4)


def test_progress_moves_the_root() -> None:
    ours = planner()
    ours.answer(report(1, new=(opened(),)), 0.0)
    (tree,) = ours.answer(report(2, done=(progress((1, 2), 3),)), 0.0)
    assert (tree.length, tree.tokens[:3]) == (42, (2, 3, 4))
    assert ours.table.counters["accepted_tokens"] == 1
    assert ours.table.counters["verified_nodes"] == 4


def test_what_the_last_request_s_last_drafts_brought_is_judged_too() -> None:
    """Else the first report of the next request, which accepted nothing yet, would count against drafting."""
    ours = planner()
    ours.answer(report(1, new=(opened(),)), 0.0)
    arm = ours.table.pacing(report(1).executor_id)._all
    assert arm._pending > 0
    ours.answer(report(2, done=(progress((1, 2, 3), 4),), closed=("r",)), 0.0)
    assert (arm._pending, arm._accepted) == (0, 2)


def test_a_closed_sequence_gets_no_tree() -> None:
    ours = planner()
    ours.answer(report(1, new=(opened("a"), opened("b"))), 0.0)
    (tree,) = ours.answer(report(2, done=(progress((1,), 2, "a"), progress((1,), 2, "b")), closed=("a", "never seen")), 0.0)
    assert tree.request_id == "b"
    assert len(ours.table) == 1


@pytest.mark.parametrize("num_left", [0, 1, 2, 3, 5])
def test_drafts_never_go_beyond_the_output_limit(num_left: int) -> None:
    """Of the tokens that may still come, the target adds one itself."""
    drafted = planner().answer(report(1, new=(opened(num_output=10, max_output=10 + num_left),)), 0.0)
    depth = max((len(tree.tokens) - 1 for tree in drafted), default=0)
    assert depth == max(0, num_left - 1)


@pytest.mark.parametrize("budget", [-1, 0, 1, 2, 7])
def test_all_trees_together_stay_within_the_budget(budget: int) -> None:
    new = tuple(opened(str(i), tpot_ms=10.0) for i in range(5))
    drafted = planner().answer(report(1, new=new, budget=budget), 0.0)
    assert sum(len(tree.tokens) - 1 for tree in drafted) == max(0, budget)


def test_a_request_behind_its_target_gets_nodes_that_throughput_alone_would_not() -> None:
    new = (opened("slow", tpot_ms=15.0), *others())
    drafted = planner().answer(report(1, new=new, latency=COSTLY), 0.0)
    assert [(tree.request_id, tree.num_required) for tree in drafted] == [("slow", 2)]
    assert len(drafted[0].tokens) == 3


def test_debt_counts_decode_time_and_decoded_tokens() -> None:
    def required(decode_ms: float, num_output: int) -> int:
        ours = planner()
        ours.answer(report(1, new=(opened(tpot_ms=30.0), *others())), 0.0)
        tokens = tuple((1, 2, 3, 4) * 20)[: num_output - 1]
        done = (progress(tokens, num_output, decode_ms=decode_ms), *go_on(2))
        drafted = ours.answer(report(2, done=done, latency=COSTLY), 0.0)
        return sum(tree.num_required for tree in drafted)

    assert required(270.0, 10) == 0, "9 tokens in 270 ms, and one more in the next 30 ms: on schedule"
    assert required(300.0, 10) == 2, "a token behind: 2 are due, and one node is not quite sure"
    assert required(200.0, 10) == 0, "ahead"


def test_progress_of_an_unknown_sequence_is_counted_and_ignored() -> None:
    ours = planner()
    assert ours.answer(report(1, done=(progress((1,), 2, "ghost"),)), 0.0) == ()
    assert ours.table.counters["unknown_sequences"] == 1


def test_a_sequence_whose_progress_does_not_add_up_is_dropped_and_may_be_opened_again() -> None:
    """The report of iteration 2 was lost: b did not decode in it."""
    ours = planner()
    ours.answer(report(1, new=(opened("a"), opened("b"))), 0.0)
    drafted = ours.answer(report(3, done=(progress((2,), 3, "a"), progress((1,), 2, "b"))), 0.0)
    assert [tree.request_id for tree in drafted] == ["b"]
    assert ours.table.counters["lost_sequences"] == 1
    assert ours.answer(report(4, done=(progress((3,), 4, "a"),)), 0.0) == ()
    assert ours.table.counters["unknown_sequences"] == 1
    assert len(ours.answer(report(5, new=(opened("a"),)), 0.0)) == 1


def test_sequences_that_have_to_be_opened_again_are_named() -> None:
    """The report of iteration 2, with progress of a and the opening of c, was lost; d ends, so nobody drafts for it."""
    ours = planner()
    ours.answer(first := report(1, new=(opened("a"), opened("b"))), 0.0)
    assert ours.unknown(first) == ()
    done = (progress((2,), 3, "a"), progress((1,), 2, "b"), progress((1,), 2, "c"), progress((1,), 2, "d"))
    ours.answer(second := report(3, done=done, closed=("d",)), 0.0)
    assert ours.unknown(second) == ("a", "c")
    again = (opened("a", num_output=3), opened("c", num_output=2))
    drafted = ours.answer(third := report(4, new=again, done=done), 0.0)
    assert {tree.request_id for tree in drafted} == {"a", "b", "c"}
    assert ours.unknown(third) == ("d",)


def test_unknown_sequences_are_named_without_a_budget_for_drafts_and_bit_by_bit() -> None:
    ours = planner()
    names = [str(i) for i in range(MAX_UNKNOWN + 5)]
    seen: set[str] = set()
    for i in range(2):
        new = tuple(opened(name, num_output=2) for name in seen)
        ours.answer(each := report(i, new=new, done=tuple(progress((1,), 2, name) for name in names), budget=0), 0.0)
        assert len(ours.unknown(each)) == (MAX_UNKNOWN, 5)[i]
        seen |= set(ours.unknown(each))
    assert seen == set(names)


def test_without_drafting_no_sequence_is_asked_for() -> None:
    ours = planner(mode="none")
    ours.answer(each := report(1, done=(progress((1,), 2, "ghost"),)), 0.0)
    assert ours.unknown(each) == ()


def test_a_sequence_without_news_gets_no_tree_and_goes_on_later() -> None:
    """Preempted ones wait for pages: nodes for them would be taken from others."""
    ours = planner()
    ours.answer(report(1, new=(opened("a"), opened("b"))), 0.0)
    drafted = ours.answer(report(2, done=(progress((1,), 2, "a"),)), 0.0)
    assert [tree.request_id for tree in drafted] == ["a"]
    drafted = ours.answer(report(3, done=(progress((2,), 3, "a"), progress((1,), 2, "b"))), 0.0)
    assert [tree.request_id for tree in drafted] == ["a", "b"]


def test_a_sequence_that_vanished_is_forgotten() -> None:
    """Cancelled requests are not always told of."""
    ours = planner()
    ours.answer(report(0, new=(opened("cancelled"), opened("r"))), 0.0)
    for i in range(1, 40):
        ours.answer(report(i, done=(progress((LOOP[i % 4 - 1],), 1 + i),)), 0.0)
    assert len(ours.table) == 1
    assert len(ours.answer(report(40, done=(progress((4,), 41),)), 0.0)) == 1


def test_a_request_that_moved_here_owes_only_what_was_decoded_here() -> None:
    """50 tokens came from an executor that died; 2 more took 90 ms here, at 30 ms per token: one is missing."""

    def required(num_decoded: int | None) -> int:
        ours = planner()
        moved = OpenedSequence(
            request_id="r", tokens=LOOP, num_output=51, max_output=100, tpot_ms=30.0, num_decoded=num_decoded
        )
        ours.answer(report(1, new=(moved, *others())), 0.0)
        done = (progress((1, 2), 53, decode_ms=90.0), *go_on(2))
        drafted = ours.answer(report(2, done=done, latency=COSTLY), 0.0)
        return sum(tree.num_required for tree in drafted)

    assert required(0) == 2
    assert required(None) == 0, "far ahead, if all 50 had been decoded in these 90 ms"


def test_opening_again_replaces_and_may_hold_the_progress_already() -> None:
    ours = planner()
    ours.answer(report(1, new=(opened(), *others())), 0.0)
    again = OpenedSequence(request_id="r", tokens=(*LOOP, 1, 2), num_output=3, max_output=100, tpot_ms=20.0)
    done = (progress((1, 2), 3, decode_ms=500.0), *go_on(2))
    (tree,) = ours.answer(report(2, new=(again,), done=done, latency=COSTLY), 0.0)
    assert tree.length == 42
    assert tree.num_required > 0, "the decode time of the report counts"


def test_executors_with_equal_request_ids_do_not_mix() -> None:
    ours = planner()
    ours.answer(report(1, new=(opened(),), executor_id="x"), 0.0)
    other = OpenedSequence(request_id="r", tokens=(9, 8, 9, 8, 9), num_output=1, max_output=50)
    (tree,) = ours.answer(report(7, new=(other,), executor_id="y"), 0.0)
    assert tree.tokens[:2] == (9, 8)
    (tree,) = ours.answer(report(2, done=(progress((1,), 2),), executor_id="x"), 0.0)
    assert tree.tokens[:2] == (1, 2)


def test_a_dropped_executor_leaves_nothing() -> None:
    ours = planner()
    ours.answer(report(1, new=(opened(),), executor_id="x"), 5.0)
    ours.answer(report(1, new=(opened(),), executor_id="y"), 9.0)
    assert ours.table.silent_since(6.0) == ["x"]
    ours.table.drop_executor("x")
    ours.table.drop_executor("x")
    assert len(ours.table) == 1
    assert ours.answer(report(2, done=(progress((1,), 2),), executor_id="x"), 9.0) == ()


def test_counters_tell_the_two_phases_apart() -> None:
    ours = planner()
    drafted = ours.answer(report(1, new=(opened("a", tpot_ms=12.0), opened("b"))), 0.0)
    counters = ours.counters
    assert counters["drafted_nodes"] == sum(len(tree.tokens) - 1 for tree in drafted)
    assert counters["slo_nodes"] == sum(tree.num_required for tree in drafted) > 0
    assert counters["throughput_nodes"] == counters["drafted_nodes"] - counters["slo_nodes"] > 0
    assert counters["unmet_quotas"] == 0


def accepted_by(tree: DraftTree, truth: list[int]) -> int:
    node = 0
    for accepted_len, token in enumerate(truth):
        below = [i for i, parent in enumerate(tree.parents) if parent == node and tree.tokens[i] == token]
        if not below:
            return accepted_len
        node = below[0]
    return len(truth)


def decode_text(mode: str, text: list[int], start: int) -> tuple[list[int], int]:
    """Decode a known text with drafts; returns what was committed and in how many iterations."""
    ours = planner(mode=mode)
    first = OpenedSequence(request_id="r", tokens=tuple(text[:start]), num_output=1, max_output=len(text) - start + 1)
    drafted = ours.answer(report(0, new=(first,)), 0.0)
    done, iterations = start, 0
    while done < len(text):
        iterations += 1
        kept = accepted_by(drafted[0], text[done:-1]) if drafted else 0
        step = tuple(text[done : done + kept + 1])
        done += len(step)
        drafted = ours.answer(report(iterations, done=(progress(step, 1 + done - start),)), 0.0)
        assert all(tree.length == done for tree in drafted)
    return text[:done], iterations


@pytest.mark.parametrize(("mode", "most"), [("heddle", 60), ("adaserve", 60), ("none", 200)])
def test_a_repetitive_text_takes_fewer_iterations_than_tokens(mode: str, most: int) -> None:
    words = [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23], [30, 31, 32, 33, 34]]
    text = [token for i in range(60) for token in words[(i * i) % 7 % 3]]
    committed, iterations = decode_text(mode, text[:220], 20)
    assert committed == text[:220]
    assert iterations <= most
    if mode == "none":
        assert iterations == 200


@pytest.mark.parametrize(("num_sequences", "bound_ms"), [(8, 1.0), (32, 5.0)])
def test_a_report_is_answered_in_time(num_sequences: int, bound_ms: float) -> None:
    ours = planner()
    names = [str(i) for i in range(num_sequences)]
    times = []
    ours.answer(report(0, new=tuple(opened(name, tpot_ms=20.0, max_output=10**6) for name in names)), 0.0)
    for i in range(1, 40):
        token = LOOP[(i - 1) % 4]
        raw = encode(report(i, done=tuple(progress((token,), 1 + i, name, 30.0 * i) for name in names), budget=64))
        start = time.process_time()
        drafted = ours.answer(decode(raw, IterationReport), 0.0)
        encode(DraftTrees(planner_id="p", iteration=i, trees=drafted))
        times.append(1000 * (time.process_time() - start))
    assert min(times) < 4 * bound_ms, "CPU time; the bound holds on an idle core, and a busy machine is slower"
