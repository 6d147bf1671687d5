"""Which sequences decode on which executor, and how far they are. Follows reports; knows no drafts and no clock."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

from common.messages import IterationReport, OpenedSequence, SequenceProgress
from services.planner.control import AcceptRate
from services.planner.drafter import Drafter
from services.planner.pacing import Pacing

MAX_UNKNOWN = 32
"""Unknown sequences named at a time: each is opened with all its tokens, and a report must fit into a message."""
MAX_SILENT_REPORTS = 16
"""A sequence without news in so many reports is gone: decoding ones progress in each, cancelled ones just vanish."""


@dataclasses.dataclass(slots=True)
class Sequence:
    """A sequence: `length` committed tokens, `root` the last; `num_decoded` of its `num_output` took `decode_ms`."""

    length: int
    root: int
    num_output: int
    max_output: int
    tpot_ms: float | None
    num_decoded: int
    decode_ms: float = 0.0
    num_silent: int = 0
    """Reports since the last one with news of it."""
    accepts: AcceptRate = dataclasses.field(default_factory=AcceptRate)

    @property
    def max_depth(self) -> int:
        """Draft tokens that can still be output: every verification adds a token of its own."""
        return max(0, self.max_output - self.num_output - 1)


@dataclasses.dataclass(slots=True)
class _Executor:
    pacing: Pacing
    reported_at: float = 0.0
    sequences: dict[str, Sequence] = dataclasses.field(default_factory=dict)


class SequenceTable:
    """All sequences by executor and request, kept in step with a drafter.

    Where progress does not add up, a report was lost and with it tokens: the sequence is dropped, named as
    unknown, and decoded without drafts until its executor opens it again.
    """

    def __init__(self, drafter: Drafter, make_pacing: Callable[[], Pacing] = Pacing) -> None:
        self._drafter = drafter
        self._make_pacing = make_pacing
        self._executors: dict[str, _Executor] = {}
        self.counters: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(len(executor.sequences) for executor in self._executors.values())

    @property
    def num_executors(self) -> int:
        """Executors that have reported and are not forgotten."""
        return len(self._executors)

    def apply(self, report: IterationReport, now: float) -> dict[str, Sequence]:
        """Take a report in; returns the sequences that decode in the executor's next iteration."""
        if report.executor_id not in self._executors:
            self._executors[report.executor_id] = _Executor(self._make_pacing())
        executor = self._executors[report.executor_id]
        executor.reported_at = now
        for sequence in executor.sequences.values():
            sequence.num_silent += 1
        for opened in report.opened:
            self._open(report.executor_id, opened)
        for progress in report.progress:
            self._advance(report.executor_id, progress)
        silent = [name for name, sequence in executor.sequences.items() if sequence.num_silent > MAX_SILENT_REPORTS]
        for request_id in (*report.closed, *silent):
            self._close(report.executor_id, request_id)
        return {name: sequence for name, sequence in executor.sequences.items() if sequence.num_silent == 0}

    def num_running(self, executor_id: str) -> int:
        """Sequences of an executor that has reported, also those without news in its last report."""
        return len(self._executors[executor_id].sequences)

    def pacing(self, executor_id: str) -> Pacing:
        """Of an executor that has reported."""
        return self._executors[executor_id].pacing

    def unknown(self, report: IterationReport) -> tuple[str, ...]:
        """Sequences that go on after this report, which was taken in, but are not known: the first of them."""
        known = self._executors[report.executor_id].sequences.keys() | set(report.closed)
        names = dict.fromkeys(each.request_id for each in report.progress if each.request_id not in known)
        return tuple(names)[:MAX_UNKNOWN]

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
            self._close(executor_id, opened.request_id)
            return
        self._executors[executor_id].sequences[opened.request_id] = Sequence(
            length=len(opened.tokens),
            root=opened.tokens[-1],
            num_output=opened.num_output,
            max_output=opened.max_output,
            tpot_ms=opened.tpot_ms,
            num_decoded=max(0, opened.num_output - 1) if opened.num_decoded is None else opened.num_decoded,
        )
        self._drafter.open((executor_id, opened.request_id), opened.tokens, tenant=opened.tenant, features=opened.features)

    def _advance(self, executor_id: str, progress: SequenceProgress) -> None:
        """Append what was committed. A sequence that the same report opened holds it already: its output count says so."""
        self.counters["verified_nodes"] += progress.num_drafted
        self.counters["accepted_tokens"] += progress.accepted_len
        sequence = self._executors[executor_id].sequences.get(progress.request_id)
        if sequence is None:
            self.counters["unknown_sequences"] += 1
            return
        num_new = progress.num_output - sequence.num_output
        if num_new not in (0, len(progress.tokens)):
            self.counters["lost_sequences"] += 1
            self._close(executor_id, progress.request_id)
            return
        sequence.decode_ms, sequence.num_silent = progress.decode_ms, 0
        sequence.accepts.observe(progress.accepted_len, progress.num_drafted)
        if num_new:
            sequence.length += num_new
            sequence.root = progress.tokens[-1]
            sequence.num_output = progress.num_output
            sequence.num_decoded += num_new
            self._drafter.extend((executor_id, progress.request_id), progress.tokens, features=progress.features)

    def _close(self, executor_id: str, request_id: str) -> None:
        if self._executors[executor_id].sequences.pop(request_id, None) is not None:
            self._drafter.close((executor_id, request_id))
