"""The latency model's online correction, against a device whose times are known."""

from __future__ import annotations

import random

import msgspec
import pytest

from common.latency import Rows, corrected, make_profile, max_rows, predict_ms

DEVICE = make_profile([(1, 13.0), (8, 30.0), (64, 150.0), (256, 520.0)])


def test_a_size_measured_on_a_busy_machine_is_right_after_a_few_passes() -> None:
    profile = make_profile([(1, 13.0), (8, 30.0), (64, 150.0), (256, 1500.0)])
    for _ in range(8):
        profile = corrected(profile, Rows(250), predict_ms(DEVICE, Rows(250)))
        for _ in range(30):
            profile = corrected(profile, Rows(8), predict_ms(DEVICE, Rows(8)))
    for tokens in (1, 8, 250, 256):
        assert predict_ms(profile, Rows(tokens)) == pytest.approx(predict_ms(DEVICE, Rows(tokens)), rel=0.2)


def test_one_stalled_pass_of_a_known_size_moves_little() -> None:
    profile = DEVICE
    for _ in range(50):
        profile = corrected(profile, Rows(8), 30.0)
    stalled = corrected(profile, Rows(8), 3000.0)
    assert predict_ms(stalled, Rows(8)) < 1.35 * predict_ms(profile, Rows(8))


def test_more_tokens_never_become_cheaper() -> None:
    rng, profile = random.Random(0), DEVICE
    for _ in range(500):
        profile = corrected(profile, Rows(rng.randrange(1, 400)), rng.uniform(1.0, 2000.0))
        costs = [ms for _, ms in profile.points]
        assert costs == sorted(costs)
        assert all(ms > 0 for ms in costs)


def test_a_profile_without_counts_is_one_that_no_pass_corrected() -> None:
    seen = corrected(DEVICE, Rows(8), 30.0).seen
    assert seen == (0.0, 1.0, 0.0, 0.0)
    assert corrected(msgspec.structs.replace(DEVICE, seen=()), Rows(8), 60.0) == corrected(DEVICE, Rows(8), 60.0)


def test_one_stalled_pass_of_a_new_size_does_not_price_larger_ones_out() -> None:
    """Plans avoid what looks dear, and what they avoid is not measured again."""
    stalled = corrected(DEVICE, Rows(8), 3000.0)
    for tokens in (8, 64, 256):
        assert predict_ms(stalled, Rows(tokens)) < 2.1 * predict_ms(DEVICE, Rows(tokens))


def test_what_scoring_costs_is_learned_apart() -> None:
    """A device that scores four times as slowly as it was measured to: decoding is not blamed for it."""
    device = msgspec.structs.replace(DEVICE, ms_per_scored_row=2.0)
    profile = msgspec.structs.replace(DEVICE, ms_per_scored_row=0.5)
    plain, scored = Rows(8), Rows(8).with_segment(200, 0, 199)
    assert scored.scored == 199
    for rows in (plain, scored) * 300:
        profile = corrected(profile, rows, predict_ms(device, rows))
    for rows in (plain, scored):
        assert predict_ms(profile, rows) == pytest.approx(predict_ms(device, rows), rel=0.05)


def test_a_segment_has_fewer_rows_for_its_time_when_they_are_scored() -> None:
    profile = msgspec.structs.replace(DEVICE, ms_per_scored_row=2.0)
    for scored in (0, 10, 1000):
        num = max_rows(profile, 200.0, 1000, Rows(8), 0, scored)
        assert predict_ms(profile, Rows(8).with_segment(num, 0, scored)) <= 200.0
        assert predict_ms(profile, Rows(8).with_segment(num + 1, 0, scored)) > 200.0
