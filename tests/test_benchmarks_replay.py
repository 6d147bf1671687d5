"""Replayed answers: what is drafted is verified against how the text goes on, with the rows that a report would bring."""

from __future__ import annotations

import pytest

from benchmarks.replay import Recorded, replay
from services.planner.drafter import FeatureNeed
from services.planner.mixed import MixedDrafter
from services.planner.ngram import NgramDrafter
from tests.test_planner_mixed import TableDrafter

LOOP = tuple(range(20, 30))


def test_a_loop_is_accepted_as_deep_as_it_is_drafted_and_noise_not_at_all() -> None:
    loop, noise = Recorded(LOOP * 9, 40), Recorded(tuple(range(1000, 1090)), 40)
    done = replay(MixedDrafter([NgramDrafter()]), [loop], num_nodes=4, depth=12, width=3)
    assert (done.num_tokens, done.num_verifies) == (49, 10), "a chain of four and one more, each time; four at the end"
    done = replay(MixedDrafter([NgramDrafter()]), [noise], num_nodes=4, depth=12, width=3)
    assert (done.tokens_per_verify, done.num_nodes) == (1.0, 0)


def test_drafts_end_with_the_text_and_texts_without_an_answer_are_left_out() -> None:
    right = TableDrafter({(): {7: 0.9}, (7,): {7: 0.9}, (7, 7): {7: 0.9}})
    done = replay(MixedDrafter([right]), [Recorded((7,) * 8, 3), Recorded((7,) * 4, 3)], num_nodes=9, depth=3, width=1)
    assert (done.num_texts, done.num_tokens, done.num_verifies, done.num_nodes) == (1, 4, 1, 3)
    assert [order.depth for order in right.asked] == [3]


@pytest.mark.parametrize(("window", "first"), [(2, 1), (9, 0)])
def test_features_are_of_the_rows_before_what_they_foresee(window: int, first: int) -> None:
    drafter = TableDrafter({(): {5: 0.9}})
    mixed = MixedDrafter([drafter], need=FeatureNeed("model", (1,), window))
    text = Recorded((1, 2, 3, 4, 5, 6, 7), 3, bytes(range(14)))
    replay(mixed, [text], num_nodes=2, depth=2, width=1)
    assert drafter.seen == [
        ("open", (1, 2, 3, 4), "", bytes(range(2 * first, 6))),
        ("extend", (5, 6), "", bytes((6, 7, 8, 9))),
        ("extend", (7,), "", bytes((10, 11))),
        ("close", (), "", b""),
    ]
