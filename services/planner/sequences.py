"""Which sequences decode on which executor, and how far they are. Follows reports; knows no drafts and no clock."""

from __future__ import annotations

import dataclasses
from collections import Counter

from common.messages import IterationReport, OpenedSequence, SequenceProgress
from services.planner.drafter import Drafter, Key


@dataclasses.dataclass(slots=True)
class Sequence:
    """A decoding sequence: `length` committed tokens of which `root` is the last; `num_output` of them are output."""

    length: int
    root: int
    num_output: int
    max_output: int
    tpot_ms: float | None
    decode_ms: float = 0.0

    @property
    def num_decoded(self) -> int:
        """Tokens of decode iterations: the first output token comes from the prefill, and TPOT starts after it."""
        return max(0, self.num_output - 1)

    @property
    def max_depth(self) -> int:
        """Draft tokens that can still be output: every verification adds a token of its own."""
        return max(0, self.max_output - self.num_output - 1)


@dataclasses.dataclass(slots=True)
class _Executor:
    iteration: int
    reported_at: float
    sequences: dict[str, Sequence] = dataclasses.field(default_factory=dict)


class SequenceTable:
    """All sequences by executor and request, kept in step with a drafter.

    Where a report was lost, the tokens of a sequence are not known any more: it is dropped, and its executor decodes it without
    drafts until it opens it again.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._executors: dict[str, _Executor] = {}
        self.counters: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(len(executor.sequences) for executor in self._executors.values())

    def apply(self, report: IterationReport, now: float) -> dict[str, Sequence]:
        """Take a report in; returns the executor's sequences that decode now."""
        executor = self._executors.setdefault(report.executor_id, _Executor(report.iteration - 1, now))
        has_gap = report.iteration != executor.iteration + 1
        executor.iteration, executor.reported_at = report.iteration, now
        if has_gap:
            self.counters["report_gaps"] += 1
            told = {each.request_id for each in report.opened} | {each.request_id for each in report.progress}
            for request_id in executor.sequences.keys() - told - set(report.closed):
                self._lose(report.executor_id, request_id)
        for opened in report.opened:
            self._open(report.executor_id, opened)
        for progress in report.progress:
            self._advance(report.executor_id, progress)
        for request_id in report.closed:
            self._close(report.executor_id, request_id)
        return executor.sequences

    def drop_executor(self, executor_id: str) -> None:
        """Forget an executor and its sequences."""
        if executor := self._executors.pop(executor_id, None):
            for request_id in executor.sequences:
                self._drafter.close((executor_id, request_id))

    def silent_since(self, moment: float) -> list[str]:
        """The executors that have not reported after this moment."""
        return [executor_id for executor_id, executor in self._executors.items() if executor.reported_at <= moment]

    def _open(self, executor_id: str, opened: OpenedSequence) -> None:
        if not opened.tokens:
            self._lose(executor_id, opened.request_id)
            return
        self._executors[executor_id].sequences[opened.request_id] = Sequence(
            length=len(opened.tokens),
            root=opened.tokens[-1],
            num_output=opened.num_output,
            max_output=opened.max_output,
            tpot_ms=opened.tpot_ms,
        )
        self._drafter.open((executor_id, opened.request_id), opened.tokens)

    def _advance(self, executor_id: str, progress: SequenceProgress) -> None:
        """A sequence that was opened in the same report holds the progress already: its output count says so."""
        self.counters["verified_nodes"] += progress.num_drafted
        self.counters["accepted_tokens"] += progress.accepted_len
        sequence = self._executors[executor_id].sequences.get(progress.request_id)
        if sequence is None:
            self.counters["unknown_sequences"] += 1
            return
        num_missing = progress.num_output - sequence.num_output
        if num_missing not in (0, len(progress.tokens)):
            self._lose(executor_id, progress.request_id)
            return
        sequence.decode_ms = progress.decode_ms
        if num_missing:
            sequence.length += num_missing
            sequence.root = progress.tokens[-1]
            sequence.num_output = progress.num_output
            self._drafter.extend((executor_id, progress.request_id), progress.tokens)

    def _lose(self, executor_id: str, request_id: str) -> None:
        self.counters["lost_sequences"] += 1
        self._close(executor_id, request_id)

    def _close(self, executor_id: str, request_id: str) -> None:
        key: Key = (executor_id, request_id)
        if self._executors[executor_id].sequences.pop(request_id, None) is not None:
            self._drafter.close(key)
