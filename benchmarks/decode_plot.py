"""Draws the decode benchmark's rows: time per token by concurrency, every ratio beside its goal. Knows rows, not servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Row = Mapping[str, Any]
COLORS = ("#1f5fa8", "#c9772b", "#8a8a8a")
"""Heddle, then its peers."""


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the picture; the file's suffix chooses its format."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    _draw_times(left, [row for row in rows if row["measure"] == "tpot"])
    _draw_ratios(right, [row for row in rows if row["ratio"] != ""])
    figure.suptitle(f"{rows[0]['model']} on {rows[0]['machine']}; vLLM {rows[0]['vllm']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_times(axes: Any, rows: Sequence[Row]) -> None:
    """Bars in groups by concurrency; whiskers from the fastest round to the slowest."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    columns = {row["ours"]: {r["size"]: _bar(r, "ours") for r in rows} for row in rows[:1]}
    for peer in dict.fromkeys(row["peer"] for row in rows):
        columns[peer] = {row["size"]: _bar(row, "peer") for row in rows if row["peer"] == peer}
    width = 0.8 / len(columns)
    for i, (name, bars) in enumerate(columns.items()):
        places = [j + (i - (len(columns) - 1) / 2) * width for j in range(len(sizes))]
        medians, below, above = zip(*(bars[size] for size in sizes), strict=True)
        color = COLORS[min(i, len(COLORS) - 1)]
        drawn = axes.bar(places, medians, width, yerr=(below, above), capsize=2, label=name, color=color)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8, padding=2)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("concurrent requests")
    axes.set_ylabel("time per output token, ms")
    axes.margins(y=0.12)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _bar(row: Row, side: str) -> tuple[float, float, float]:
    median = row[f"{side}_median"]
    return median, median - row[f"{side}_min"], row[f"{side}_max"] - median


def _draw_ratios(axes: Any, rows: Sequence[Row]) -> None:
    """One bar per ratio, a line at its goal; shorter is better, and 1 is as fast as the peer."""
    several = len({row["peer"] for row in rows}) > 1
    labels = [_label(row) + (f", {row['peer']}" if several else "") for row in rows]
    axes.barh(range(len(rows)), [row["ratio"] for row in rows], 0.6, color=COLORS[0])
    for i, row in enumerate(rows):  # numbers in a column of their own, where no goal crosses them
        axes.text(1.02, i, f"{row['ratio']:.2f}", fontsize=8, va="center", transform=axes.get_yaxis_transform())
        if row["goal"] != "":
            is_first = all(earlier["goal"] == "" for earlier in rows[:i])
            axes.plot([row["goal"]] * 2, [i - 0.4, i + 0.4], color="black", lw=2, label="goal" if is_first else None)
    axes.axvline(1, color=COLORS[2], lw=1, ls=":")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("Heddle / vLLM, less is better")
    axes.legend(fontsize=8, frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)


def _label(row: Row) -> str:
    if row["measure"] == "tpot":
        return f"per token, {row['size']} at once"
    return f"first token, prompt of {row['size']}" if row["measure"] == "ttft" else "start to first token"
