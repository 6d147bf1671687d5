"""The co-serving benchmark's arithmetic: schedules, attainment, tokens of a time, losses, goals. No server."""

from __future__ import annotations

import itertools
import json

import pytest

from benchmarks.bench_coserving import parse
from benchmarks.coserving_rows import (
    OURS,
    SEPARATE,
    UNTRAINED,
    Iteration,
    Piece,
    burst_rows,
    busy_row,
    check_losses,
    iterations,
    judged,
    load_row,
    pieces,
    request_rows,
    tokens_between,
)
from benchmarks.coserving_sides import halves
from benchmarks.open_loop import Load, Outcome
from benchmarks.streams import Sample
from benchmarks.workloads import Arrival, poisson


def outcome(ttft_ms: float | None, tpot_ms: float = 100.0, num_tokens: int = 11, at_s: float = 0.0) -> Outcome:
    arrival = Arrival(at_s=at_s, workload="chat", prompt="p", tpot_ms=150.0, ttft_ms=5000.0)
    return Outcome(arrival=arrival, sample=None if ttft_ms is None else Sample("t", ttft_ms, tpot_ms, num_tokens, {}))


def test_a_poisson_schedule_has_its_rate_and_is_the_same_each_time() -> None:
    arrivals = poisson(["a", "b", "c"], 5.0, 400.0, 150.0, 5000.0)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.1)
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.15), "as exponential gaps"
    assert 0 < arrivals[0].at_s < arrivals[-1].at_s < 400.0
    assert [a.prompt for a in arrivals[:4]] == ["a", "b", "c", "a"]
    assert arrivals == poisson(["a", "b", "c"], 5.0, 400.0, 150.0, 5000.0)
    assert arrivals[:9] != poisson(["a", "b", "c"], 5.0, 400.0, 150.0, 5000.0, seed=1)[:9]
    assert 0 < poisson(["a"], 0.001, 10.0, 150.0, 5000.0)[0].at_s <= 5.0


@pytest.mark.parametrize(
    "arguments", [["--sides", "temporal64"], ["--sides", SEPARATE], ["--sides", "temporal 64"]], ids=" ".join
)
def test_a_side_that_cannot_be_run_or_would_leave_out_a_part_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_coserving", *arguments])
    with pytest.raises(SystemExit):
        parse()
    assert "--sides" in capsys.readouterr().err


def test_the_loads_of_some_sides_alone_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench_coserving", "--parts", "loads", "--sides", "temporal 64", "spatial"])
    assert parse().sides == ["temporal 64", "spatial"]


def test_a_late_first_token_misses_the_target_too() -> None:
    found = [outcome(4999.0), outcome(5001.0), outcome(100.0, tpot_ms=150.1), outcome(None)]
    assert [each.attained for each in found] == [True, False, False, False]


def test_tokens_of_a_time_are_those_of_the_parts_within() -> None:
    work = [Piece(0.0, 10.0, 100.0), Piece(10.0, 12.0, 60.0), Piece(30.0, 31.0, 5.0)]
    assert tokens_between(work, 5.0, 11.0) == pytest.approx(50.0 + 30.0)
    assert tokens_between(work, 12.0, 30.0) == 0.0
    assert tokens_between(work, -5.0, 50.0) == pytest.approx(165.0)


def test_iterations_are_read_from_an_executors_log() -> None:
    fields = {"number": 7, "decode": 2, "draft": 0, "prefill": 3, "finetune": 40, "backward": 0.0, "ms": 120.0}
    stamp = {"event": "iteration", "timestamp": "2026-01-02T03:04:05.5Z"}
    log = [
        "no JSON\n",
        json.dumps({"event": "gateway.lost"}),
        json.dumps(fields | stamp),
        json.dumps(fields | stamp | {"backward": 20.5}),
    ]
    found = iterations(log)
    assert found[0] == Iteration(1767323045.5, 120.0, 2, 3, 40, 0.0)
    assert pieces(found) == [Piece(1767323045.38, 1767323045.5, 20.5)]


def test_a_row_has_medians_rates_and_the_share_that_attained() -> None:
    outcomes = (outcome(100.0, 50.0), outcome(200.0, 70.0), outcome(6000.0, 90.0, num_tokens=21), outcome(None))
    load = Load(outcomes=outcomes, seconds=20.0, started_at=1000.0)
    row = load_row("light", 0.2, OURS, load, [Piece(990.0, 1010.0, 400.0), Piece(1010.0, 1030.0, 100.0)])
    assert (row["requests"], row["unanswered"], row["attainment"]) == (4, 1, 0.5)
    assert (row["ttft_ms"], row["tpot_ms"]) == (200, 70.0)
    assert (row["inference_tokens_per_s"], row["tokens_per_s"]) == (2.1, 12.5)
    nobody = load_row("light", 0.2, OURS, Load(outcomes=(outcome(None),), seconds=20.0, started_at=0.0), [])
    assert (nobody["attainment"], nobody["tpot_ms"], nobody["tokens_per_s"]) == (0.0, "", 0.0)


def test_inference_alone_takes_the_time_of_its_iterations() -> None:
    load = Load(outcomes=(outcome(100.0),), seconds=20.0, started_at=1000.0)
    spans = [
        (1001.0, 2000.0),
        (1010.0, 4000.0),
        (1021.0, 3000.0),
        (990.0, 5.0),
    ]  # the first one began before, the third ends after
    row = busy_row("heavy", 0.8, load, [Iteration(end, ms, 1, 0, 0, 0.0) for end, ms in spans])
    assert (row["side"], row["workload"], row["value"]) == (UNTRAINED, "heavy", (1.0 + 4.0 + 2.0) / 20.0)


def test_goals_are_held_against_the_separate_set_up_at_equal_attainment() -> None:
    def row(side: str, load: str, rate: float, attainment: float, speed: float) -> dict[str, object]:
        return {"workload": load, "rate": rate, "side": side, "attainment": attainment, "tokens_per_s": speed}

    rows = [
        row(OURS, "light", 0.1, 1.0, 500.0), row(OURS, "medium", 0.5, 0.95, 400.0), row(OURS, "heavy", 1.0, 0.5, 300.0),
        row(SEPARATE, "light", 0.1, 1.0, 250.0), row(SEPARATE, "medium", 0.5, 1.0, 200.0),
        row(SEPARATE, "heavy", 1.0, 0.6, 100.0), row("temporal 64", "light", 0.1, 0.2, 0.0),
    ]  # fmt: skip
    found = judged(rows)
    by_place = {(each["side"], each["workload"]): each for each in found[:-1]}
    light, heavy = by_place[SEPARATE, "light"], by_place[SEPARATE, "heavy"]
    assert (light["heddle_over_it"], light["goal"], light["met"]) == (2.0, 2.5, "no")
    assert (heavy["heddle_over_it"], heavy["met"]) == (3.0, "no"), "faster, but it attains less"
    assert "goal" not in by_place[SEPARATE, "medium"]
    assert "heddle_over_it" not in by_place["temporal 64", "light"]
    assert (found[-1]["workload"], found[-1]["value"], found[-1]["met"]) == ("medium", 0.8, "yes")
    assert judged(rows[:1]) == [{**rows[0], "heddle_over_it": 1.0}], "one rate says nothing about what is kept"


def test_losses_have_to_fall_as_pefts_do() -> None:
    peer = [2.0, 1.9, 1.7, 1.6]
    check_losses("side", [2.01, 1.9, 1.72, 1.6], peer)
    check_losses(
        "side", [1.3, 0.8, 1.3, 1.0], [1.3, 0.8, 1.31, 1.02]
    )  # other sequences in every step: peft's do not fall either
    for wrong, what in (
        ([2.0, 1.9, 1.95, 2.0], "does not fall"),
        ([2.1, 1.9, 1.7, 1.5], "first loss"),
        ([2.0, 1.6, 1.5, 1.4], "mean loss"),
        ([2.0, 1.9, 1.7], "3 losses"),
    ):
        with pytest.raises(SystemExit, match=what):
            check_losses("side", wrong, peer)


def test_a_burst_is_told_by_iteration_and_by_request() -> None:
    found = [Iteration(at, 100.0, 2, 0, 30, 0.0) for at in (9.0, 10.5, 12.0, 99.0)]
    assert [row["at_s"] for row in burst_rows(found, 10.0, 20.0)] == [0.5, 2.0]
    load = Load(outcomes=(outcome(500.0, 100.0, num_tokens=11, at_s=2.0), outcome(None)), seconds=5.0)
    (row,) = request_rows(load)
    assert (row["at_s"], row["until_s"], row["tpot_ms"]) == (2.5, 3.5, 100.0)


def test_cores_are_shared_out_evenly_and_one_core_does_for_both() -> None:
    assert halves([0, 1, 2, 3]) == ([0, 1], [2, 3])
    assert halves([4, 5]) == ([4], [5])
    assert halves([3]) == ([3], [3])
