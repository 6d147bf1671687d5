"""From a plan to the segments of a pass: which rows in which slots, and whose pages when none are free. Knows no tensors."""

from __future__ import annotations

import dataclasses

from services.executor.batch import Segment
from services.executor.pages import OutOfPagesError, PageAllocator
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
    """Builds the inference segments of a pass; preempts the youngest sequences when the oldest lack pages."""

    def __init__(self, pages: PageAllocator) -> None:
        self.num_preemptions = 0
        self._pages = pages
        self._sequences: dict[str, Sequence] = {}

    def work(self, plan: IterationPlan, sequences: dict[str, Sequence]) -> list[Work]:
        """Segments of all planned sequences, oldest first for pages, neighbours by adapter for launches."""
        self._sequences = sequences
        works: list[Work] = []
        for sequence in sorted(sequences.values(), key=_arrival):
            if sequence.request_id in plan.decode and sequence.is_decoding:
                segment = self._decode(sequence, plan.decode[sequence.request_id])
            elif sequence.request_id in plan.prefill:
                segment = self._prefill(sequence, plan.prefill[sequence.request_id])
            else:
                continue
            if segment is not None:
                works.append(Work(sequence, segment, sequence.request_id in plan.decode))
        works = [work for work in works if work.sequence.table.pages]
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
        start = sequence.num_computed
        end = start + num_tokens
        if not self._reserve(sequence, end):
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
        """Pages for `num_tokens` tokens, taken from the youngest sequences if none are free; False if it must wait."""
        while True:
            try:
                self._pages.reserve(sequence.table, num_tokens)
            except OutOfPagesError:
                victim = max((s for s in self._sequences.values() if s.table.pages), key=_arrival, default=None)
                if victim is None or victim.request.arrived_at < sequence.request.arrived_at:
                    return False
                self._preempt(victim)
                if victim is sequence:
                    return False
            else:
                return True

    def _preempt(self, sequence: Sequence) -> None:
        self._pages.release(sequence.table)
        sequence.num_computed = 0
        sequence.tree = None
        self.num_preemptions += 1


def _arrival(sequence: Sequence) -> float:
    return sequence.request.arrived_at
