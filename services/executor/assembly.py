"""From a plan to the segments of a pass: which rows in which slots, and whose pages when none are free. Knows no tensors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from common.latency import Rows
from services.executor.batch import Segment
from services.executor.pages import PageAllocator
from services.executor.scheduler import IterationPlan
from services.executor.sequences import Sequence
from services.executor.verify import depths, prune


@dataclasses.dataclass(frozen=True)
class Work:
    """One sequence's part of a pass."""

    sequence: Sequence
    segment: Segment
    is_decode: bool


class Assembly:
    """Builds the inference segments of a pass. Who is short of pages takes them from younger sequences, or waits.

    The oldest sequence is never preempted and never waits, so every sequence ends. Of equal arrivals the first submitted is
    the older one.
    """

    def __init__(self, pages: PageAllocator) -> None:
        self.num_preemptions = 0
        self._pages = pages
        self._by_age: list[Sequence] = []

    def runnable(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """The sequences, oldest first, that can have the pages they need: others would waste their place in a plan.

        Each goes on behind the longest cached prefix. One that has started needs room for its next token; one that has not for
        all its tokens, else it would soon be preempted again, and holds no cached page while there is none.
        """
        self._by_age = sorted(sequences, key=_arrival)
        for sequence in self._by_age:
            sequence.publish(self._pages)
        for sequence in self._by_age:
            sequence.take_over(self._pages)
        if sum(self._needed(sequence) for sequence in self._by_age) <= self._pages.num_free:
            return list(self._by_age)
        found = []
        num_obtainable = self._pages.num_free + len(_held(self._by_age))
        held: set[int] = set()
        for sequence in self._by_age:
            own = set(sequence.table.pages) - held
            if self._needed(sequence) <= num_obtainable - len(held) - len(own):
                found.append(sequence)
            elif not sequence.has_started:
                self._preempt(sequence)
                continue
            held |= own
        return found

    def _needed(self, sequence: Sequence) -> int:
        num_tokens = sequence.num_computed + 1 if sequence.has_started else len(sequence.tokens)
        return self._pages.missing(sequence.table, num_tokens)

    def work(self, plan: IterationPlan, sequences: Iterable[Sequence]) -> list[Work]:
        """Segments of all planned sequences, oldest first for pages, neighbours by adapter for launches."""
        self._by_age = sorted(sequences, key=_arrival)
        works: list[Work] = []
        for sequence in self._by_age:
            if sequence.request_id in plan.decode and sequence.is_decoding:
                segment = self._decode(sequence, plan.decode[sequence.request_id])
            elif sequence.request_id in plan.prefill:
                segment = self._prefill(sequence, plan.prefill[sequence.request_id])
            else:
                continue
            if segment is not None:
                works.append(Work(sequence, segment, sequence.request_id in plan.decode))
        return sorted(works, key=lambda work: work.sequence.adapter.name if work.sequence.adapter else "")

    def _decode(self, sequence: Sequence, num_nodes: int) -> Segment | None:
        tree = None if sequence.tree is None or num_nodes == 0 else prune(sequence.tree, num_nodes)
        length = len(sequence.tokens)
        if tree is not None and self._pages.missing(sequence.table, length + len(tree.tokens) - 1) > self._pages.num_free:
            tree = None
        sequence.tree = tree
        tokens = [sequence.tokens[-1]] if tree is None else list(tree.tokens)
        if not self._reserve(sequence, length + len(tokens) - 1):
            return None
        parents = None if tree is None else tree.parents
        return Segment(
            tokens=tokens,
            positions=[length - 1 + depth for depth in depths(tree.parents)] if tree else [length - 1],
            context_slots=sequence.table.slots(0, length - 1),
            slots=sequence.table.slots(length - 1, length - 1 + len(tokens)),
            adapter=sequence.adapter,
            parents=parents,
            wants_logits="all",
        )

    def _prefill(self, sequence: Sequence, num_tokens: int) -> Segment | None:
        sequence.take_over(self._pages)  # again: it may have been preempted since the plan was made
        start = sequence.num_computed
        end = min(start + num_tokens, len(sequence.tokens))
        if self._pages.missing(sequence.table, end) > self._pages.num_free:
            num_pages = len(sequence.table.pages) + self._pages.num_free + len(self._spare(sequence))
            end = min(end, num_pages * self._pages.page_size)
        if end <= start or not self._reserve(sequence, end):
            return None
        return Segment(
            tokens=sequence.tokens[start:end],
            positions=range(start, end),
            context_slots=sequence.table.slots(0, start),
            slots=sequence.table.slots(start, end),
            adapter=sequence.adapter,
            wants_logits="last" if end == len(sequence.tokens) else "none",
        )

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for `num_tokens` tokens, the youngest sequences' if none are free; False, and nothing done, if it must wait."""
        missing = self._pages.missing(sequence.table, num_tokens)
        if missing > self._pages.num_free:
            spare = self._spare(sequence)
            if missing > self._pages.num_free + len(spare):
                return False
            for victim in self._younger(sequence):
                if missing <= self._pages.num_free:
                    break
                if not spare.isdisjoint(victim.table.pages):
                    self._preempt(victim)
        self._pages.reserve(sequence.table, num_tokens)
        return True

    def _spare(self, sequence: Sequence) -> set[int]:
        """Pages that only younger sequences hold: what preempting them all would free."""
        younger = list(self._younger(sequence))
        return _held(younger) - _held(self._by_age[: len(self._by_age) - len(younger)])

    def _younger(self, sequence: Sequence) -> Iterator[Sequence]:
        """The younger sequences, youngest first."""
        return itertools.takewhile(lambda other: other is not sequence, reversed(self._by_age))

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += sequence.has_started
        sequence.give_back(self._pages)


def _held(sequences: Iterable[Sequence]) -> set[int]:
    """The pages of all of them, each once."""
    return set().union(*(sequence.table.pages for sequence in sequences))


def decode_rows(works: Iterable[Work]) -> Rows:
    """What the decoding sequences' part of a pass costs by."""
    rows = Rows()
    for work in works:
        if work.is_decode:
            rows = rows.with_segment(len(work.segment.tokens), len(work.segment.context_slots))
    return rows


def _arrival(sequence: Sequence) -> float:
    return sequence.request.arrived_at
