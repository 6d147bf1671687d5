"""The cohorts benchmark: its arithmetic, and that it does not time answers that differ."""

from __future__ import annotations

import pytest

from benchmarks.bench_cohorts import check, rows_of
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
