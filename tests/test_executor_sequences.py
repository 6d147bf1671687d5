"""The token state of one request: what it tells the scheduler, the planner and the requester, and when it ends."""

from __future__ import annotations

from typing import Any

import pytest

from common.messages import Slo
from services.executor.pages import PageAllocator
from services.executor.sequences import Sequence
from tests.drafts import make_tree
from tests.tiny import tiny_request


def sequence(*prompt: int, max_tokens: int = 8, stop: tuple[int, ...] = (), **fields: Any) -> Sequence:
    request = tiny_request("r", prompt, max_tokens, slo=Slo(tpot_ms=50.0), arrived_at=3.0, **fields)
    return Sequence(
        request=request,
        tokens=list(prompt),
        table=PageAllocator(8, 4).table(),
        adapter=None,
        stop_ids=frozenset(stop),
        first_token_due_at=4.0,
        num_output=request.num_generated,
    )


def prefilled(made: Sequence, token: int, now: float) -> Sequence:
    made.num_computed = len(made.tokens)
    assert made.commit((token,), now) is None
    return made


def test_a_waiting_sequence() -> None:
    view = sequence(1, 2, 3).view(100.0)
    assert (view.is_decoding, view.num_uncomputed, view.context_tokens) == (False, 3, 0)
    assert (view.arrived_at, view.first_token_due_at, view.decode_ms, view.num_decoded) == (3.0, 4.0, 0.0, 0)
    assert not sequence(1).view(100.0).is_decoding, "a prompt of one token is still a prompt"


def test_time_and_tokens_per_output_token_count_from_the_first_token() -> None:
    made = prefilled(sequence(1, 2, 3), 9, now=10.0)
    assert made.is_decoding
    view = made.view(10.0)
    assert (view.num_decoded, view.decode_ms, view.max_remaining, view.tpot_ms) == (0, 0.0, 7, 50.0)
    made.num_computed += 3
    made.commit((4, 5, 6), now=10.2)
    view = made.view(10.3)
    assert (view.num_decoded, view.max_remaining, view.context_tokens) == (3, 4, 6)
    assert view.decode_ms == pytest.approx(300.0)
    assert made.decode_ms(9.0) == 0.0, "a clock that is set back gives no negative time"


def test_a_sequence_that_came_from_another_executor_counts_its_own_tokens() -> None:
    made = prefilled(sequence(1, 2, 3, 4, max_tokens=8, num_generated=3), 9, now=10.0)
    assert made.view(10.0).num_decoded == 0
    assert made.view(10.0).max_remaining == 4
    assert made.opened().num_output == 4
    assert (made.usage(10.0).prompt_tokens, made.usage(10.0).completion_tokens) == (1, 4)


def test_a_tree_counts_only_while_the_sequence_decodes() -> None:
    made = prefilled(sequence(1, 2, 3), 9, now=10.0)
    made.tree = make_tree("r", 4, (9, 5, 6), (-1, 0, 1), num_required=1)
    view = made.view(10.0)
    assert (view.tree_probs, view.num_required) == (made.tree.probs[1:], 1)
    made.num_computed = 0
    view = made.view(10.0)
    assert (view.is_decoding, view.num_uncomputed, view.tree_probs, view.num_required) == (False, 4, (), 0)


@pytest.mark.parametrize(
    ("tokens", "kept", "reason"),
    [
        ((5, 6), 2, None),
        ((5, 7, 6), 2, "stop"),
        ((7, 7), 1, "stop"),
        ((1, 2, 3, 4, 5), 5, None),
        ((1, 2, 3, 4, 5, 6, 8, 9, 10), 7, "length"),
        ((1, 2, 3, 4, 5, 6, 7, 8), 7, "stop"),
    ],
)
def test_the_first_token_that_ends_a_request_is_its_last(tokens: tuple[int, ...], kept: int, reason: str | None) -> None:
    made = prefilled(sequence(1, 2, 3, stop=(7,)), 9, now=10.0)
    assert made.commit(tokens, now=11.0) == reason
    assert made.tokens == [1, 2, 3, 9, *tokens[:kept]]
    assert made.num_output == 1 + kept
