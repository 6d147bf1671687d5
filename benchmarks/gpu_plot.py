"""Draws what the GPU benchmark measured: kernels against their ceilings, iterations against the roofline. Knows rows only."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.gpu_results import Row

COLOR, GOAL_COLOR = "#1f5fa8", "#c9772b"


def plot_kernels(bars: list[tuple[str, float, float | None]], title: str, path: Path) -> None:
    """A bar per kernel and shape, a mark at its goal."""
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.22 * len(bars)), layout="constrained")
    axes.barh(range(len(bars)), [share for _, share, _ in bars], 0.7, color=COLOR)
    goals = [(i, goal) for i, (_, _, goal) in enumerate(bars) if goal is not None]
    axes.plot([goal for _, goal in goals], [i for i, _ in goals], "|", color=GOAL_COLOR, ms=12, mew=3, label="goal")
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of the copy's bandwidth or the product's rate, whichever is nearer")
    _save(figure, axes, title, path)


def plot_iterations(rows: list[Row], title: str, path: Path) -> None:
    """Time by sequences: a line per provider and load, dashed the time in which the weights are read once."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        lines[f"{row['provider']}: {row['load']}"].append((float(str(row["decodes"])), float(str(row["p50_ms"]))))
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, label=label)
    axes.axhline(float(str(rows[0]["roofline_ms"])), color="black", ls="--", lw=1, label="weights read once")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("sequences that decode")
    axes.set_ylabel("one iteration, ms")
    axes.set_ylim(bottom=0)
    _save(figure, axes, title, path)


def _save(figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)
