"""In which order sequences go back: what is at the same layer goes together. Knows no formula, loss, job or optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from common.activation_plan import MAX_WINDOW_TOKENS
from services.executor.backward_cursor import BackwardCursor, BackwardWindow
from services.executor.backward_unit import BackwardUnit
from services.executor.model import Decoder, KvCache


def advance(
    decoder: Decoder,
    cache: KvCache,
    cursors: Sequence[BackwardCursor],
    max_token_layers: int,
    max_rows: int = MAX_WINDOW_TOKENS,
    is_stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Do up to this much work (tokens times layers) for all of them together, in fused units of up to so many rows; returns
    what was done. When it is stopped, it ends after the unit in work.

    Who is at the highest layer goes first, so that all meet at the layer of the one that is ahead and share units from there
    on: that one waits for each of the others at most once.
    """
    budget = max_token_layers
    while budget > 0 and (windows := next_unit(cursors, min(max_rows, budget))):
        BackwardUnit(decoder, cache, windows).run()
        budget -= sum(window.num_rows for window in windows)
        if left := [window.cursor for window in windows if window.cursor.move(window.start)]:
            torch._foreach_zero_([cursor.accumulators for cursor in left])
        if is_stopped():
            break
    return max_token_layers - budget


def next_unit(cursors: Sequence[BackwardCursor], max_rows: int) -> list[BackwardWindow]:
    """Windows of one kind at the highest layer that any cursor is at, of at most so many rows; none when all are done."""
    waiting = [cursor for cursor in cursors if not cursor.is_done]
    if not waiting:
        return []
    kind = max(waiting, key=lambda cursor: cursor.layer).kind
    windows: list[BackwardWindow] = []
    for cursor in waiting:
        if max_rows > 0 and cursor.kind == kind:
            windows.append(cursor.window(max_rows))
            max_rows -= windows[-1].num_rows
    return windows
