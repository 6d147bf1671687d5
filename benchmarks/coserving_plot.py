"""Draws the finetuning benchmark's rows: speed and memory of every side, by workload. Knows rows, not sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Row = Mapping[str, Any]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the picture; the file's suffix chooses its format."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    sides = list(dict.fromkeys(row["side"] for row in rows))
    columns = (("tokens_per_s", "finetuning, tokens/s"), ("mb_beyond_weights", "peak memory beyond weights, MB"))
    for chart, (column, label) in zip(axes, columns, strict=True):
        for i, side in enumerate(sides):
            heights = [
                next(row[column] for row in rows if (row["workload"], row["side"]) == (name, side)) for name in workloads
            ]
            bars = chart.bar([j + (i - (len(sides) - 1) / 2) * 0.27 for j in range(len(workloads))], heights, 0.25, label=side)
            chart.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
        chart.set_xticks(range(len(workloads)), workloads)
        chart.set_ylabel(label)
        chart.margins(y=0.12)
        chart.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['dtype']}, on {rows[0]['machine']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
