"""Which decoding sequences take part in an iteration: all, or one of two halves that verify in turns while drafts for the other
half are made. Pure; knows no trees.

A cohort is a half. It hides the time of drafting behind the other half's pass, and pays a second pass for it: the weights are
read twice for what one pass of all could do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from services.executor.views import SequenceView


class Cohorts:
    """Newcomers join the smaller half. With one cohort, everyone decodes in each iteration."""

    def __init__(self, num_cohorts: int = 1) -> None:
        self._num = num_cohorts
        self._of: dict[str, int] = {}
        self._last: dict[str, int] = {}
        """The iteration that last brought each sequence tokens: drafts for its next one answer that one's report."""

    def take_turns(self, views: Seq[SequenceView], iteration: int) -> list[SequenceView]:
        """The views for this iteration's plan: decoding ones that wait for the other half are marked as resting."""
        names = [view.request_id for view in views if view.is_decoding]
        self._last = dict.fromkeys(names, iteration - 1) | self._last
        chosen = self._next(names)
        return [
            dataclasses.replace(view, is_resting=True) if view.is_decoding and view.request_id not in chosen else view
            for view in views
        ]

    def decoded(self, names: Iterable[str], iteration: int) -> None:
        """These had their turn: of those that were to decode, the ones that the plan let."""
        self._last |= dict.fromkeys(names, iteration)

    def awaited(self, decoding: Iterable[str], iteration: int) -> int:
        """The iteration whose report the next pass's trees answer; `iteration` is the one that has just ended."""
        names = list(decoding)
        for name in names:
            self._last.setdefault(name, iteration)
        return max((self._last[name] for name in self._next(names)), default=iteration)

    def next_pass(self, decoding: Iterable[str]) -> frozenset[str]:
        """Who decodes in the next iteration, if these are still there."""
        return self._next(decoding)

    def _next(self, decoding: Iterable[str]) -> frozenset[str]:
        """The half of whoever has waited longest. Newcomers join the smaller one; who has left is forgotten."""
        names = list(decoding)
        of = {name: self._of[name] for name in names if name in self._of}
        self._last = {name: self._last[name] for name in names if name in self._last}
        sizes = [list(of.values()).count(cohort) for cohort in range(self._num)]
        for name in names:
            if name not in of:
                of[name] = sizes.index(min(sizes))
                sizes[of[name]] += 1
        self._of = of
        members = [[name for name in names if of[name] == cohort] for cohort in range(self._num)]
        waited = [half for half in members if half]
        newest = max(self._last.values(), default=0)
        return frozenset(min(waited, key=lambda half: min(self._last.get(name, newest) for name in half), default=()))
