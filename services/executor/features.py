"""Hidden states of committed tokens, kept for a planner whose drafter asked for them. Knows rows and positions, no drafter.

F is the width of a row: the hidden sizes of the asked layers side by side. Rows travel as bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import structlog
import torch
from torch import Tensor

from common.messages import OpenedSequence, PlannerGranted

MAX_WINDOW = 512
MAX_LAYERS = 8
MAX_REPORT_BYTES = 2 * 1024 * 1024
"""Of a report's features of opened sequences: when all are opened at once, drafters live with fewer."""
Rows = np.ndarray[Any, np.dtype[np.uint16]]
log = structlog.get_logger()


class FeatureWish(NamedTuple):
    """States after these layers (1 is the first one, the number of layers the output before the final norm) of the last
    `window` committed tokens; nothing is kept for an empty wish."""

    layers: tuple[int, ...] = ()
    window: int = 0


def wish_of(granted: PlannerGranted, num_layers: int) -> FeatureWish:
    """What the planner asks for; nothing, and a warning, if this model cannot give it."""
    wish = FeatureWish(granted.feature_layers, granted.feature_window)
    if not wish.layers:
        return FeatureWish()
    rising = all(low < high for low, high in zip((0, *wish.layers), wish.layers, strict=False))
    if not rising or wish.layers[-1] > num_layers or len(wish.layers) > MAX_LAYERS or not 1 <= wish.window <= MAX_WINDOW:
        log.warning("planner.impossible_features", layers=wish.layers, window=wish.window, num_layers=num_layers)
        return FeatureWish()
    return wish


def bounded(opened: Iterable[OpenedSequence]) -> tuple[OpenedSequence, ...]:
    """The sequences, the first ones with their features, as long as there is room for them."""
    found, num_bytes = [], 0
    for sequence in opened:
        num_bytes += len(sequence.features)
        found.append(sequence if num_bytes <= MAX_REPORT_BYTES else msgspec.structs.replace(sequence, features=b""))
    return tuple(found)


class FeatureWindow:
    """The last rows [n, F] of one sequence; the last one is of the token before position `end`.

    They lie in a buffer of two windows, so that a new row moves the others once in a window and not each time.
    """

    def __init__(self, wish: FeatureWish, end: int, rows: Rows) -> None:
        self.wish, self.end = wish, end
        self._buffer = np.empty((2 * wish.window, rows.shape[1]), dtype=rows.dtype)
        self._first = self._next = 0
        self._push(rows)

    @property
    def rows(self) -> Rows:
        """Those that are kept, the newest last."""
        return self._buffer[self._first : self._next]

    def append(self, start: int, rows: Rows) -> None:
        """Rows of the tokens from position `start` on. After a gap the older ones are forgotten; known ones stay."""
        if start > self.end:
            self._first, self.end = self._next, start
        new = rows[self.end - start :]
        self._push(new)
        self.end += len(new)

    def before(self, position: int) -> bytes:
        """The rows of the tokens before this position, if that is where they end."""
        return self.rows.tobytes() if position == self.end else b""

    def _push(self, rows: Rows) -> None:
        rows = rows[-self.wish.window :]
        self._first = max(self._first, self._next + len(rows) - self.wish.window)
        if self._next + len(rows) > len(self._buffer):
            kept = self.rows.copy()
            self._first, self._next = 0, len(kept)
            self._buffer[: self._next] = kept
        self._buffer[self._next : self._next + len(rows)] = rows
        self._next += len(rows)


class PassFeatures:
    """The states of one pass: gathered in as many operations whatever the pass holds, and shared out to its sequences.

    `also` are layers whose states somebody else than the planner wants.
    """

    def __init__(self, wish: FeatureWish, also: Iterable[int] = ()) -> None:
        self.wish = wish
        self._layers = {*wish.layers, *also}
        self._states: dict[int, Tensor] = {}
        self._starts: list[int] = []
        self._rows: Rows | None = None

    @property
    def states(self) -> list[Tensor]:
        """What was kept so far for the planner, by layer."""
        return self.of_layers(self.wish.layers)

    def of_layers(self, layers: Iterable[int]) -> list[Tensor]:
        """What was kept so far of these layers, in their order."""
        return [self._states[layer] for layer in layers if layer in self._states]

    def adopt(self, states: Sequence[Tensor]) -> None:
        """Take the states of a recorded pass as this one's."""
        self._states = dict(zip(self.wish.layers, states, strict=True))

    def keep(self, layer: int, x_TH: Tensor) -> None:
        """The state after this many layers."""
        if layer in self._layers:
            self._states[layer] = x_TH

    def room(self, x_TH: Tensor, num_layers: int) -> dict[int, Tensor]:
        """Where the states after the wanted layers but the last one will be, by the number of layers."""
        found = {layer: torch.empty_like(x_TH) for layer in sorted(self._layers) if layer < num_layers}
        self._states |= found
        return found

    def gather(self, starts: Sequence[int], sizes: Sequence[int], are_decoding: Sequence[bool]) -> None:
        """Segment i has `sizes[i]` rows from `starts[i]` on: all of trees, the last `window` of prompts are taken."""
        states = self.states
        if not states:
            return
        taken = list[int]()
        for start, size, is_decoding in zip(starts, sizes, are_decoding, strict=False):
            self._starts.append(len(taken))
            taken += range(start if is_decoding else max(start, start + size - self.wish.window), start + size)
        self._starts.append(len(taken))
        rows_R = torch.tensor(taken, dtype=torch.int64, device=states[0].device)
        rows_RF = torch.cat([state_TH[rows_R] for state_TH in states], dim=1).to(torch.bfloat16).cpu()
        self._rows = rows_RF.view(torch.int16).numpy().view(np.uint16)

    def take(self, segment: int, window: FeatureWindow | None, end: int, nodes: Sequence[int] | None) -> FeatureWindow | None:
        """The window with the segment's rows: those of the nodes of a tree, which end before position `end`, or all."""
        if self._rows is None:
            return None
        rows = self._rows[self._starts[segment] : self._starts[segment + 1]]
        rows = rows if nodes is None else rows[list(nodes)]
        start = end - len(rows)
        if window is None or window.wish != self.wish:
            window = FeatureWindow(self.wish, start, rows[:0])
        window.append(start, rows)
        return window

    def of(self, segment: int, nodes: Sequence[int]) -> bytes:
        """The rows of these nodes."""
        if self._rows is None:
            return b""
        return self._rows[self._starts[segment] : self._starts[segment + 1]][list(nodes)].tobytes()
