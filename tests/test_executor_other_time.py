"""What iterations take beyond their decoding rows: learned apart from what verifies, and from passes beside a busy planner."""

from __future__ import annotations

import pytest

from services.executor.other_time import OtherTime


def learned(*iterations: tuple[float, bool, bool]) -> OtherTime:
    found = OtherTime()
    for other_ms, is_mixed, is_plain in iterations:
        for _ in range(60):
            found.learn(other_ms, is_mixed=is_mixed, is_plain=is_plain)
    return found


def test_mixed_iterations_tell_what_they_add() -> None:
    found = learned((2.0, False, True), (30.0, True, False))
    assert found.plain_ms == pytest.approx(2.0, rel=0.01)
    assert found.mixed_ms == pytest.approx(28.0, rel=0.01)
    assert learned((9.0, False, True), (3.0, True, False)).mixed_ms == 0.0


def test_iterations_that_verify_tell_nothing_of_roots_alone() -> None:
    found = learned((8.0, False, False))
    assert found.plain_ms == 0.0
    assert found.busy_ms == pytest.approx(8.0, rel=0.01)
    found = learned((8.0, False, False), (2.0, False, True), (8.0, False, False))
    assert found.plain_ms == pytest.approx(2.0, rel=0.01)
    assert found.busy_ms == pytest.approx(6.0, rel=0.01)


def test_verifying_never_takes_less_than_roots_alone() -> None:
    assert learned((8.0, False, True), (2.0, False, False)).busy_ms == 0.0


def test_an_iteration_that_was_faster_than_predicted_adds_nothing() -> None:
    assert learned((-5.0, False, True)).plain_ms == 0.0
