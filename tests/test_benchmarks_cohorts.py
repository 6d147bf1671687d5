"""The cohorts benchmark: its arithmetic, and that it does not time answers that differ."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_cohorts
from benchmarks.bench_cohorts import check, measure, rows_of
from benchmarks.streams import Sample


def answer(text: str, tpot_ms: float, verify_steps: int) -> Sample:
    return Sample(text, 10.0, tpot_ms, 11, {"slo": {"verify_steps": verify_steps}})


def test_rows_tell_medians_and_their_ratio() -> None:
    answers = {
        "1": [answer("a", 10.0, 5), answer("b", 20.0, 5), answer("c", 90.0, 5)],
        "2": [answer("a", 25.0, 5), answer("b", 30.0, 10), answer("c", 35.0, 10)],
    }
    one, two = rows_of(3, answers)
    assert (one["value"], one["tokens_per_verify"], one["requests"]) == (20.0, 2.0, 3)
    assert (two["value"], two["tokens_per_verify"], two["over_one"]) == (30.0, 1.2, 1.5)
    assert "over_one" not in one


def test_answers_that_differ_are_not_timed() -> None:
    same = {"1": [answer("a", 10.0, 5)], "2": [answer("a", 30.0, 5)]}
    check(same)
    with pytest.raises(SystemExit, match="1 of 1 answers"):
        check(same | {"2": [answer("b", 30.0, 5)]})


@pytest.mark.parametrize(("until", "num_rounds"), [(math.inf, 3), (0.0, 1)])
def test_sides_get_the_same_prompts_in_turn_until_time_is_up(
    until: float, num_rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    async def closed(url: str, batch: list[str], concurrency: int, max_tokens: int, salt: str) -> list[Sample]:
        assert (concurrency, max_tokens) == (2, bench_cohorts.MAX_TOKENS)
        asked.append((url, batch))
        return [answer(text, 1.0, 1) for text in batch]

    monkeypatch.setattr(bench_cohorts, "closed", closed)
    monkeypatch.setattr(bench_cohorts, "settle", lambda: None)
    servers: Any = {side: SimpleNamespace(url=side) for side in ("1", "2")}
    answers = measure(servers, ["a", "b", "c"], 2, 3, until)
    batches = [["a", "b"], ["c", "a"], ["b", "c"]][:num_rounds]
    assert asked == [(side, batch) for i, batch in enumerate(batches) for side in ("12", "21")[i % 2]]
    assert [[sample.text for sample in answers[side]] for side in ("1", "2")] == [
        [text for batch in batches for text in batch]
    ] * 2
