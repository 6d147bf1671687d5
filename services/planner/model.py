"""The model drafter: beam search with a small language model. Knows sequences, pages and trees, no tensor's inside.

A sequence's keys and values lie in pages of one pool, of committed tokens only: those of drafted tokens are in pages that are
given back when the draft is made, so that nothing has to be taken back when the target decides otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from services.planner.beams import MAX_CHILDREN, Beam, expand, gain
from services.planner.draft_model import DraftModel
from services.planner.drafter import DraftOrder, Key, Pool

PAGE_SIZE = 16
MAX_ROWS = 128
"""Committed tokens that one draft reads, of all sequences: a long prompt is read over several reports, and drafted for then."""

MIN_GAIN = 0.3
"""Tokens that a level must be able to bring to be drafted: it costs a pass of the draft model."""


@dataclasses.dataclass(slots=True, eq=False)
class _Followed:
    """A sequence: the keys and values of its first `num_read` tokens are in its pages."""

    tokens: list[int]
    pages: list[int] = dataclasses.field(default_factory=list)
    num_read: int = 0
    is_foreign: bool = False
    """It holds a token that the draft model does not have."""

    def slots(self, num_tokens: int) -> Tensor:
        return _slots(self.pages)[:num_tokens]


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What the first pass of a draft does for one order: reads tokens up to `end`; with `scratch` pages it is drafted for."""

    order: int
    followed: _Followed
    end: int
    scratch: list[int]

    @property
    def is_ready(self) -> bool:
        return self.end == len(self.followed.tokens)


class ModelDrafter:
    """Follows sequences with a draft model. Keys and values of those that were not drafted for lately make room for others."""

    is_free = False

    def __init__(self, model: DraftModel, *, min_prob: float = 0.02) -> None:
        """Nodes under `min_prob` are no candidates."""
        self.model = model
        self.counters: Counter[str] = Counter()
        self._min_log_prob = math.log(min_prob)
        self._followed: OrderedDict[Key, _Followed] = OrderedDict()
        self._num_pages: int = model.num_slots // PAGE_SIZE
        self._free = list(range(self._num_pages))

    def open(self, key: Key, tokens: Sequence[int], *, tenant: str = "", features: bytes = b"") -> None:
        """See Drafter."""
        self.close(key)
        self._followed[key] = _Followed([])
        self.extend(key, tokens)

    def extend(self, key: Key, tokens: Sequence[int], *, features: bytes = b"") -> None:
        """See Drafter."""
        followed = self._followed[key]
        followed.tokens += tokens
        followed.is_foreign |= not all(0 <= token < self.model.vocab_size for token in tokens)

    def close(self, key: Key) -> None:
        """See Drafter."""
        if (followed := self._followed.pop(key, None)) is not None:
            self._give_back(followed)

    @property
    def num_pages_in_use(self) -> int:
        """Pages that hold keys and values of committed tokens."""
        return self._num_pages - len(self._free)

    def draft(self, orders: Sequence[DraftOrder]) -> list[Pool]:
        """See Drafter."""
        pools = [Pool() for _ in orders]
        readings = self._readings(orders)
        try:
            if readings:
                log_probs_RV = self._read(readings)
                ready = [reading for reading in readings if reading.is_ready]
                if ready:
                    self._search(ready, log_probs_RV, orders, pools)
        finally:  # a pass may run out of memory
            for reading in readings:
                self._free += reading.scratch
        return pools

    # --- committed tokens ------------------------------------------------------------------------------------------

    def _readings(self, orders: Sequence[DraftOrder]) -> list[_Reading]:
        """Those that lack fewest tokens first: a long prompt does not hold up who only decodes."""
        wanted: list[tuple[int, int, _Followed]] = []
        for i, order in enumerate(orders):
            followed = self._followed[order.key]
            self._followed.move_to_end(order.key)
            length = len(followed.tokens)
            if order.depth <= 0 or followed.is_foreign or not length or length + order.depth > self.model.max_length:
                continue
            followed.num_read = min(followed.num_read, length - 1)  # the last token is read again if nothing came after it
            wanted.append((length - followed.num_read, i, followed))
        readings: list[_Reading] = []
        room = MAX_ROWS
        for num_missing, i, followed in sorted(wanted, key=lambda each: each[:2]):
            num_rows = min(num_missing, room)
            num_scratch = _num_pages(orders[i].width * orders[i].depth) if num_rows == num_missing else 0
            end = followed.num_read + num_rows
            num_more = _num_pages(end) - len(followed.pages)
            busy = [followed, *(reading.followed for reading in readings)]
            if num_rows and self._make_room(num_more + num_scratch, busy):
                followed.pages += self._take(num_more)
                readings.append(_Reading(i, followed, end, self._take(num_scratch)))
                room -= num_rows
            elif num_rows:
                self.counters["sequences_without_room"] += 1
        return readings

    def _make_room(self, num_pages: int, busy: Sequence[_Followed]) -> bool:
        """So many free pages, of those that were not drafted for the longest; nothing is changed where that is impossible."""
        held = {id(followed) for followed in busy}
        victims = [followed for followed in self._followed.values() if id(followed) not in held and followed.pages]
        if num_pages > len(self._free) + sum(len(followed.pages) for followed in victims):
            return False
        for followed in victims:
            if num_pages <= len(self._free):
                break
            self._give_back(followed)
            self.counters["evictions"] += 1
        return True

    def _take(self, num_pages: int) -> list[int]:
        taken = self._free[len(self._free) - num_pages :]
        del self._free[len(self._free) - num_pages :]
        return taken

    def _give_back(self, followed: _Followed) -> None:
        self._free += followed.pages
        followed.pages, followed.num_read = [], 0

    def _read(self, readings: Sequence[_Reading]) -> Tensor:
        """Read what is new of all of them in one pass; log probabilities [R, V] after the last tokens of those ready."""
        tokens, positions, seen, sizes, wanted = list[int](), list[int](), list[Tensor](), list[int](), list[int]()
        for reading in readings:
            followed = reading.followed
            new = range(followed.num_read, reading.end)
            tokens += followed.tokens[new.start : new.stop]
            positions += new
            seen.append(followed.slots(reading.end))
            sizes.append(len(new))
            if reading.is_ready:
                wanted.append(len(tokens) - 1)
        slots_T = torch.cat([slots_L[len(slots_L) - size :] for slots_L, size in zip(seen, sizes, strict=True)])
        self.counters["rows_read"] += len(tokens)
        found = self.model.log_probs(tokens, positions, slots_T, seen, sizes, wanted or [0])
        for reading in readings:
            reading.followed.num_read = reading.end
        return found

    # --- beams -----------------------------------------------------------------------------------------------------

    def _search(
        self, ready: Sequence[_Reading], log_probs_RV: Tensor, orders: Sequence[DraftOrder], pools: Sequence[Pool]
    ) -> None:
        """One pass for each level of all orders together."""
        contexts = {reading.order: reading.followed.slots(reading.end) for reading in ready}
        scratch = {reading.order: iter(_slots(reading.scratch).tolist()) for reading in ready}
        beams = [Beam(reading.order, -1, 0.0, row, []) for row, reading in enumerate(ready)]
        for depth in range(1, max(order.depth for order in orders) + 1):
            guesses = _guesses(log_probs_RV)
            beams = expand(beams, guesses, pools, orders, depth=depth, min_log_prob=self._min_log_prob)
            if not beams or gain(beams) < MIN_GAIN:
                return
            for beam in beams:
                beam.slots = [*beam.slots, next(scratch[beam.order])]
            log_probs_RV = self.model.log_probs(
                [pools[beam.order].tokens[beam.node] for beam in beams],
                [len(contexts[beam.order]) + depth - 1 for beam in beams],
                torch.tensor([beam.slots[-1] for beam in beams]),
                [torch.cat([contexts[beam.order], torch.tensor(beam.slots)]) for beam in beams],
                [1] * len(beams),
                range(len(beams)),
            )
            self.counters["rows_drafted"] += len(beams)


def _guesses(log_probs_RV: Tensor) -> list[list[tuple[int, float]]]:
    values, tokens = (top.tolist() for top in log_probs_RV.topk(min(MAX_CHILDREN, log_probs_RV.shape[1]), dim=1))
    return [list(zip(*row, strict=True)) for row in zip(tokens, values, strict=True)]


def _slots(pages: Sequence[int]) -> Tensor:
    return (torch.tensor(pages, dtype=torch.int64)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()


def _num_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)
