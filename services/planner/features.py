"""The features drafter: beam search with a head on the target's hidden states. Knows sequences and trees, no tensor's inside.

The head's keys and values of a sequence live in a ring of slots, as long as the head's window, and a few more for the beams.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from services.planner.beams import MAX_CHILDREN, Beam, expand, gain
from services.planner.drafter import DraftOrder, FeatureNeed, Key, Pool
from services.planner.features_head import FeaturesHead

MAX_BEAM_SLOTS = 64
"""Rows of one draft, per sequence."""
MAX_READ_ROWS = 256
"""Rows that one draft reads of all sequences together: after a rest the latest of each must do: reading all takes longer
than an executor waits.
"""


@dataclasses.dataclass(slots=True)
class _Followed:
    """A sequence: its `length` tokens, of which the rows of [start, end) are in the ring; `pending` rows are still to come."""

    length: int
    base: int
    start: int = 0
    end: int = 0
    features: list[bytes] = dataclasses.field(default_factory=list)
    """The pending rows: appended one by one while drafting rests, joined when they are read."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    """What follows each pending row."""
    last_features: bytes = b""
    last_token: int | None = None
    """The row before `end`, to draft from it once more."""


class FeaturesDrafter:
    """Follows sequences whose executor sends features; of others it has no candidates."""

    is_free = False

    def __init__(self, head: FeaturesHead, *, min_prob: float = 0.02, min_gain: float = 0.45) -> None:
        """Nodes under `min_prob` are no candidates; a level, which costs 2 ms, is drafted if it can bring `min_gain` tokens."""
        self.head = head
        self.counters: Counter[str] = Counter()
        self._min_log_prob, self._min_gain = math.log(min_prob), min_gain
        self._followed: dict[Key, _Followed] = {}
        self._free: list[int] = []
        self._num_slots = 0

    @property
    def need(self) -> FeatureNeed:
        """What it wants of executors."""
        return FeatureNeed(self.head.fingerprint, self.head.feature_layers, self.head.window)

    def open(self, key: Key, tokens: Sequence[int], *, tenant: str = "", features: bytes = b"") -> None:
        """See Drafter."""
        self.close(key)
        followed = self._followed[key] = _Followed(len(tokens), self._ring())
        num_rows = self._num_rows(features, most=len(tokens) - 1)
        self._restart(followed, followed.length - 1 - num_rows)
        self._take(followed, features, tokens[len(tokens) - num_rows :])

    def extend(self, key: Key, tokens: Sequence[int], *, features: bytes = b"") -> None:
        """See Drafter."""
        followed = self._followed[key]
        followed.length += len(tokens)
        if len(features) != self.head.row_bytes * len(tokens):
            self.counters["rows_missing"] += len(tokens)
            self._restart(followed, followed.length - 1)
            return
        self._take(followed, features, tokens)

    def close(self, key: Key) -> None:
        """See Drafter."""
        if (followed := self._followed.pop(key, None)) is not None:
            self._free.append(followed.base)

    def warm_up(self) -> None:
        """Draft once for a sequence of nothing, as long as the window: what is first called allocates and is slow."""
        key, num_rows = ("", "warm-up"), self.head.window
        self.open(key, [0] * (num_rows + 1), features=bytes(num_rows * self.head.row_bytes))
        min_gain, self._min_gain = self._min_gain, 0.0
        self.draft([DraftOrder(key, self.head.max_depth, 3)])
        self._min_gain = min_gain
        self.close(key)

    @torch.inference_mode()
    def draft(self, orders: Sequence[DraftOrder]) -> list[Pool]:
        """See Drafter."""
        pools = [Pool() for _ in orders]
        roots = self._roots(orders)
        if not roots:
            return pools
        self.head.reserve(self._num_slots, max(each.length for each in self._followed.values()) + self.head.max_depth + 1)
        out_RH, log_probs_RV = self._read(roots)
        beams = [Beam(order, -1, 0.0, row, []) for row, (order, _) in enumerate(roots)]
        for depth in range(1, self.head.max_depth + 1):
            guesses = self._guesses(log_probs_RV)
            beams = expand(beams, guesses, pools, orders, depth=depth, min_log_prob=self._min_log_prob)
            if not beams or depth == self.head.max_depth or gain(beams) < self._min_gain:
                break
            out_RH, log_probs_RV = self._step(beams, out_RH, orders, pools, depth)
        return pools

    # --- rows ------------------------------------------------------------------------------------------------------

    def _ring(self) -> int:
        size = self.head.window + MAX_BEAM_SLOTS
        if not self._free:
            self._free.append(self._num_slots)
            self._num_slots += size
        return self._free.pop()

    def _num_rows(self, features: bytes, most: int) -> int:
        num_rows, rest = divmod(len(features), self.head.row_bytes)
        if rest or num_rows > most:
            self.counters["rows_malformed"] += 1
            return 0
        return num_rows

    def _restart(self, followed: _Followed, position: int) -> None:
        """The next row is the one of the token at this position; what was before it is forgotten."""
        followed.start = followed.end = position
        followed.features, followed.tokens, followed.last_token = [], [], None

    def _take(self, followed: _Followed, features: bytes, following: Sequence[int]) -> None:
        size = self.head.row_bytes
        followed.features += [features[at : at + size] for at in range(0, len(features), size)]
        followed.tokens += following
        self._forget_before(followed, self.head.window)

    def _forget_before(self, followed: _Followed, most: int) -> None:
        """Keep the last `most` pending rows; if that leaves a gap, nothing before it."""
        if (surplus := len(followed.tokens) - most) > 0:
            del followed.features[:surplus], followed.tokens[:surplus]
            followed.start = followed.end = followed.end + surplus

    def _roots(self, orders: Sequence[DraftOrder]) -> list[tuple[int, _Followed]]:
        """The sequences whose last rows are there: with their place among the orders."""
        found = []
        for i, order in enumerate(orders):
            followed = self._followed[order.key]
            if order.depth <= 0 or followed.end + len(followed.tokens) != followed.length - 1:
                continue
            if not followed.tokens and followed.last_token is not None:  # drafted before: its last row is read again
                followed.features, followed.tokens = [followed.last_features], [followed.last_token]
                followed.end -= 1
            if followed.tokens:
                found.append((i, followed))
        for _, followed in found:
            self._forget_before(followed, max(1, MAX_READ_ROWS // len(found)))
        return found

    def _read(self, roots: Sequence[tuple[int, _Followed]]) -> tuple[Tensor, Tensor]:
        """Put the pending rows of these sequences into their rings; the outcome of the last row of each."""
        tokens, positions, slots, seen = list[int](), list[int](), list[int](), list[list[int]]()
        window = self.head.window
        ends = list(accumulate(len(followed.tokens) for _, followed in roots))
        for _, followed in roots:
            new = range(followed.end, followed.end + len(followed.tokens))
            tokens += followed.tokens
            positions += new
            slots += [followed.base + position % window for position in new]
            followed.start, followed.end = max(followed.start, new.stop - window), new.stop
            seen.append(self._ring_slots(followed))
        states_RH = self.head.states(b"".join(row for _, followed in roots for row in followed.features))
        for _, followed in roots:
            followed.last_features, followed.last_token = followed.features[-1], followed.tokens[-1]
            followed.features, followed.tokens = [], []
        x_RH, q_RND = self.head.write(states_RH, tokens, positions, slots, is_own=False)
        last_R = torch.tensor(ends) - 1
        return self.head.attend(x_RH[last_R], q_RND[last_R], seen)

    def _ring_slots(self, followed: _Followed) -> list[int]:
        return [followed.base + position % self.head.window for position in range(followed.start, followed.end)]

    # --- beams -----------------------------------------------------------------------------------------------------

    def _guesses(self, log_probs_RV: Tensor) -> list[list[tuple[int, float]]]:
        """The likeliest tokens after each row, of those that the head has a name for."""
        values, places = (top.tolist() for top in log_probs_RV.topk(min(MAX_CHILDREN, self.head.other), dim=1))
        vocabulary, other = self.head.vocabulary, self.head.other
        return [
            [(vocabulary[place], value) for value, place in zip(*row, strict=True) if place != other]
            for row in zip(values, places, strict=True)
        ]

    def _step(
        self, beams: Sequence[Beam], out_RH: Tensor, orders: Sequence[DraftOrder], pools: Sequence[Pool], depth: int
    ) -> tuple[Tensor, Tensor]:
        """One row for each beam: its parent's output and its token."""
        used: Counter[int] = Counter()
        seen, tokens, positions, slots = list[list[int]](), list[int](), list[int](), list[int]()
        per_level = MAX_BEAM_SLOTS // self.head.max_depth
        rings = {beam.order: self._ring_slots(self._followed[orders[beam.order].key]) for beam in beams}
        for beam in beams:
            followed = self._followed[orders[beam.order].key]
            slot = followed.base + self.head.window + per_level * (depth - 1) + used[beam.order]
            used[beam.order] += 1
            beam.slots = [*beam.slots, slot]
            tokens.append(pools[beam.order].tokens[beam.node])
            positions.append(followed.end - 1 + depth)
            slots.append(slot)
            seen.append(rings[beam.order] + beam.slots)
        rows_R = torch.tensor([beam.row for beam in beams])
        x_RH, q_RND = self.head.write(out_RH[rows_R], tokens, positions, slots, is_own=True)
        return self.head.attend(x_RH, q_RND, seen)
