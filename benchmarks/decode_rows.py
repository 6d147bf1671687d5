"""What the decode benchmark measures, its goals, and its arithmetic: rounds in, rows out. Pure; knows no server."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Measure(NamedTuple):
    """One line of the table; `size` counts requests for tpot and prompt tokens for ttft."""

    name: str
    size: int
    unit: str


FIRST_START = Measure("first start to first token", 0, "s")
"""With nothing kept by a start before it: Heddle only, vLLM's caches are its user's."""
START = Measure("start to first token", 0, "s")
CONCURRENCIES = (1, 8, 32)
PREFILLS = (512, 1024)


def tpot(concurrency: int) -> Measure:
    """Mean over that many concurrent requests of the time per token after the first."""
    return Measure("tpot", concurrency, "ms")


def ttft(prompt_tokens: int) -> Measure:
    """Time to the first token of one prompt on an idle server."""
    return Measure("ttft", prompt_tokens, "ms")


GOALS = {tpot(1): 0.60, tpot(8): 0.65, tpot(32): 0.75, ttft(512): 0.9, START: 0.3}
"""Heddle's median over vLLM's, at most."""


class Rounds:
    """The numbers of all rounds, by measure and server."""

    def __init__(self) -> None:
        self._taken: dict[Measure, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, measure: Measure, server: str, value: float) -> None:
        """One round's number of one server, in the measure's unit."""
        self._taken[measure][server].append(value)

    def rows(self, ours: str, peers: tuple[str, ...], shared: Mapping[str, object]) -> list[dict[str, object]]:
        """A row per measure and peer: medians, their ratio and its goal; `shared` ends every row.

        A measure that a peer lacks is a row with empty cells for the peer, once.
        """
        return [{**row, **shared} for row in self._rows(ours, peers)]

    def _rows(self, ours: str, peers: tuple[str, ...]) -> Iterator[dict[str, object]]:
        for measure, values in self._taken.items():
            for peer in [name for name in peers if values[name]] or [""]:
                mine, theirs = values[ours], values.get(peer, [])
                ratio = statistics.median(mine) / statistics.median(theirs) if theirs else None
                goal = GOALS.get(measure)
                yield {
                    "measure": measure.name, "size": measure.size or "", "unit": measure.unit, "ours": ours, "peer": peer,
                    **_spread("ours", mine), **_spread("peer", theirs),
                    "ratio": "" if ratio is None else round(ratio, 3),
                    "goal": "" if goal is None or ratio is None else goal,
                    "met": "" if goal is None or ratio is None else ("yes" if ratio <= goal else "no"),
                    "rounds": len(mine),
                }  # fmt: skip


def _spread(side: str, values: list[float]) -> dict[str, object]:
    names = (f"{side}_median", f"{side}_min", f"{side}_max")
    if not values:
        return dict.fromkeys(names, "")
    numbers = (statistics.median(values), min(values), max(values))
    return {name: round(number, 2) for name, number in zip(names, numbers, strict=True)}


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two answers share from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
