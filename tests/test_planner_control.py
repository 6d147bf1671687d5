"""The control of speculation: depth per request, rests where drafting does not pay, and what that means for whole runs."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from common.latency import Rows, predict_ms
from common.messages import DraftTree, IterationReport, LatencyProfile, OpenedSequence, SequenceProgress
from services.planner.actor import make_planner
from services.planner.config import PlannerConfig
from services.planner.control import (
    AcceptRate,
    draft_depth,
    draft_width,
    least_worth,
    most_gain,
    quota_limit,
    token_debt,
    useful_depth,
    useful_width,
)

WAIT_MS = 5.0
CPU_LIKE = LatencyProfile(
    points=((1, 20.0), (8, 24.0), (32, 55.0), (64, 95.0), (256, 330.0)), ms_per_context_token=1e-4, ms_per_row_context=1e-4
)
LOOP = list(range(20, 30))
NUM_PROMPT = 40


@dataclasses.dataclass
class Played:
    """What a run took and did."""

    ms: float = 0.0
    iterations: int = 0
    rests: int = 0
    drafted: int = 0
    unmet: float = 0.0
    tpot_ms: dict[int, float] = dataclasses.field(default_factory=dict)
    """By text."""


def accepted_by(tree: DraftTree, coming: list[int]) -> int:
    """Length of the tree's path that continues as the text does."""
    node = 0
    for accepted_len, token in enumerate(coming):
        below = [i for i, parent in enumerate(tree.parents) if parent == node and tree.tokens[i] == token]
        if not below:
            return accepted_len
        node = below[0]
    return len(coming)


def play(
    mode: str, texts: list[list[int]], *, targets: dict[int, float] | None = None, num_cohorts: int = 1, busy_ms: float = 0.0
) -> Played:
    """Decode known texts as an executor would, in modelled time: drafts are waited for unless the planner rests.

    `targets` are the ms per token that some texts shall take.
    """
    ours, played = make_planner(PlannerConfig(mode=mode)), Played()
    drafts: dict[str, DraftTree] = {}
    done, start = dict.fromkeys((str(i) for i in range(len(texts))), NUM_PROMPT), NUM_PROMPT
    text_of = dict(zip(done, texts, strict=True))
    opened = tuple(
        OpenedSequence(
            request_id=name, tokens=tuple(text[:start]), num_output=1, max_output=len(text) - start + 1,
            tpot_ms=(targets or {}).get(int(name)),
        )
        for name, text in text_of.items()
    )  # fmt: skip
    progress: tuple[SequenceProgress, ...] = ()
    resting_until = 0
    while done:
        played.iterations += 1
        rows, turn = Rows(), [name for name in done if (int(name) - played.iterations) % num_cohorts == 0]
        for name in turn:
            rows = rows.with_segment(1, done[name])
        plain_ms = predict_ms(CPU_LIKE, rows)
        report = IterationReport(
            executor_id="e", iteration=played.iterations, opened=opened, progress=progress, token_budget=64,
            base_tokens=len(turn), t_spec_ms=plain_ms + busy_ms + WAIT_MS, busy_ms=busy_ms, wait_ms=WAIT_MS, latency=CPU_LIKE,
        )  # fmt: skip
        drafts |= {tree.request_id: tree for tree in ours.answer(report, 0.0)}
        found = {name: drafts.pop(name) for name in turn if name in drafts}
        if played.iterations <= resting_until:
            played.rests += 1
        elif mode != "none":
            played.ms += WAIT_MS
        resting_until = played.iterations + ours.num_resting("e")
        for name, tree in found.items():
            played.drafted += len(tree.tokens) - 1
            rows = rows.widened(len(tree.tokens) - 1, done[name])
        played.ms += predict_ms(CPU_LIKE, rows)
        progress, opened = (), ()
        for name in turn:
            text, at, drafted = text_of[name], done[name], found.get(name)
            kept = accepted_by(drafted, text[at:-1]) if drafted else 0
            step, done[name] = tuple(text[at : at + kept + 1]), at + kept + 1
            progress += (
                SequenceProgress(
                    request_id=name, tokens=step, num_drafted=len(drafted.tokens) - 1 if drafted else 0, accepted_len=kept,
                    num_output=1 + done[name] - start, decode_ms=played.ms,
                ),
            )  # fmt: skip
            if done[name] >= len(text):
                played.tpot_ms[int(name)] = played.ms / (len(text) - start)
                del done[name]
    played.unmet = ours.counters["unmet_quotas"]
    return played


def noise(num_texts: int, num_tokens: int, vocabulary: int) -> list[list[int]]:
    """Texts that n-grams find matches in everywhere, and guess badly."""
    rng = np.random.default_rng(4)
    return [[int(token) for token in rng.integers(0, vocabulary, num_tokens)] for _ in range(num_texts)]


@pytest.mark.parametrize(("num_requests", "at_most"), [(1, 1.1), (8, 1.02), (32, 1.004)])
def test_drafts_that_do_not_pay_rest_and_cost_next_to_nothing(num_requests: int, at_most: float) -> None:
    texts = noise(num_requests, 540 if num_requests < 32 else 240, 40)
    plain, ours = play("none", texts), play("heddle", texts)
    assert ours.ms <= at_most * plain.ms
    assert ours.rests > 0.6 * ours.iterations


def test_halves_that_differ_in_size_do_not_end_each_others_rests() -> None:
    ours = play("heddle", noise(3, 300, 40), num_cohorts=2)
    assert ours.rests > 0.6 * ours.iterations


def test_fixed_drafts_cost_twice_the_time_where_ours_cost_next_to_nothing() -> None:
    texts = noise(8, 80, 40)
    assert play("chain:4", texts).ms > 2 * play("none", texts).ms


@pytest.mark.parametrize(("num_requests", "at_most"), [(1, 0.25), (8, 0.6)])
def test_drafts_that_pay_do_not_rest(num_requests: int, at_most: float) -> None:
    texts = [LOOP * 30] * num_requests
    ours = play("heddle", texts)
    assert ours.ms < at_most * play("none", texts).ms
    assert ours.rests == 0


def test_what_a_planner_at_work_adds_to_passes_is_held_against_drafts() -> None:
    """Thirteen tokens instead of one do not pay for a pass that takes fifteen times as long."""
    texts = [LOOP * 30] * 4
    assert play("heddle", texts).rests == 0
    ours = play("heddle", texts, busy_ms=400.0)
    assert ours.rests > 0.6 * ours.iterations


def test_text_that_begins_to_repeat_is_drafted_again() -> None:
    texts = [text + LOOP * 40 for text in noise(4, 200, 40)]
    plain, ours = play("none", texts), play("heddle", texts)
    assert ours.rests > 20
    assert ours.ms < 0.7 * plain.ms


def test_requests_that_their_target_leaves_behind_are_drafted_for_where_throughput_would_rest() -> None:
    """A fifth of the texts repeats: drafts for these bring hardly more tokens per ms at this load, but pay debts."""
    texts, bound = noise(26, 400, 40) + [LOOP * 40] * 6, range(26, 32)
    free, ours = play("heddle", texts), play("heddle", texts, targets=dict.fromkeys(bound, 50.0))
    assert free.rests > 0.8 * free.iterations
    assert all(free.tpot_ms[i] > 53.0 for i in bound)
    assert all(ours.tpot_ms[i] < 51.0 for i in bound)


def test_the_most_that_drafts_can_bring_falls_with_what_a_level_costs() -> None:
    gains = [most_gain(30.0, level_ms, 8) for level_ms in (0.0, 3.0, 15.0, 24.0, 30.0)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] == pytest.approx(sum(0.9**k for k in range(9)))
    assert gains[3] == pytest.approx(1.9 / 1.8)
    assert gains[4] == pytest.approx(1.9 / 2.0)
    assert most_gain(30.0, 3.0, 0) == 0.0


def test_depth_ends_where_even_the_best_path_is_worth_less_than_it_costs() -> None:
    for rate in (0.3, 0.6, 0.9):
        for worth in (0.02, 0.1, 0.5):
            depth = useful_depth(rate, worth, 50)
            assert depth == 1 or rate**depth >= worth * (1 - 1e-9)
            assert rate ** (depth + 1) < worth
    assert useful_depth(0.9, 0.0, 12) == useful_depth(1.0, 0.5, 12) == 12
    assert useful_depth(0.9, 2.0, 12) == 1
    assert useful_depth(0.9, 0.02, 0) == 0


def test_a_level_is_as_wide_as_its_nodes_can_pay() -> None:
    for rate, worth in itertools.product((0.0, 0.3, 0.72, 0.95, 1.0), (0.02, 0.1, 0.3)):
        width = useful_width(rate, worth, 50)
        others = [(1.0 - rate) / k for k in range(1, 50)]
        assert width == 1 + sum(prob >= worth - 1e-12 for prob in others)
    assert useful_width(0.5, 0.0, 3) == useful_width(0.2, 0.01, 3) == 3
    assert [useful_width(rate, 0.1, 4) for rate in (0.95, 0.85, 0.4)] == [1, 2, 4]


def test_a_node_is_worth_what_its_row_and_its_level_cost_in_tokens() -> None:
    assert least_worth(1, 30.0, 0.0, 0.0) == 0.0
    assert least_worth(10, 50.0, 1.0, 0.0) == pytest.approx(0.2), "10 tokens in 50 ms: 0.2 tokens per ms"
    assert least_worth(1, 20.0, 0.0, 2.0) == pytest.approx(0.1)


def test_a_request_that_is_guessed_badly_gets_a_shallower_tree_than_one_that_is_guessed_well() -> None:
    bad, good, new = AcceptRate(), AcceptRate(), AcceptRate()
    for _ in range(10):
        bad.observe(0, 6)
        good.observe(6, 6)
        new.observe(0, 0)
    depths = [useful_depth(accepts.rate, 0.05, 12) for accepts in (bad, new, good)]
    assert depths[0] <= 2
    assert depths[0] < depths[1] <= depths[2] == 12


@pytest.mark.parametrize(
    ("num_requests", "depth", "width"), [(8, 8, 3), (32, 8, 3), (40, 8, 2), (64, 7, 1), (1, 8, 3), (900, 4, 1)]
)
def test_depth_and_width_follow_the_papers_settings(num_requests: int, depth: int, width: int) -> None:
    """Llama-70B's settings of the artifact: B1 = 512 with roots, B2 = 96, depth 4..8, width up to 3, c1 = c2 = 0."""
    assert draft_depth(512 - num_requests, num_requests, offset=0, least=4, most=8) == depth
    assert draft_width(96, num_requests, offset=0, most=3) == width


def test_debt_is_what_the_schedule_lacks() -> None:
    assert token_debt(0.0, 100.0, 50.0, 0) == 2.0
    assert token_debt(400.0, 100.0, 50.0, 8) == 2.0
    assert token_debt(400.0, 100.0, 50.0, 20) == 1.0
    assert token_debt(1e9, 100.0, None, 0) == 1.0


def test_quota_limit_is_a_share_and_never_zero() -> None:
    assert [quota_limit(100, 10), quota_limit(3, 10), quota_limit(0, 0)] == [12, 1, 1]
