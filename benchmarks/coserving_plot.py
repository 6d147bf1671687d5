"""Draws the co-serving benchmark's rows: sides beside each other, and a burst over time. Knows rows, not sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks import coserving_rows, finetune_alone
from benchmarks.coserving_rows import TPOT_MS

Row = Mapping[str, Any]
WIDTH = 0.8
ALONE = (("tokens_per_s", "finetuning alone, tokens/s"), ("mb_beyond_weights", "peak memory beyond weights, MB"))
SHARED = (("attainment", "requests that met their target, share"), ("tokens_per_s", "finetuning beside serving, tokens/s"))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the picture, a row of charts for each part that has rows; the file's suffix chooses its format."""
    parts = [([row for row in rows if row["measure"] == finetune_alone.MEASURE], ALONE)]
    parts += [([row for row in rows if row["measure"] == coserving_rows.MEASURE], SHARED)]
    parts = [(found, columns) for found, columns in parts if found]
    if not parts:
        return
    figure, axes = pyplot.subplots(len(parts), 2, figsize=(11, 3.8 * len(parts)), layout="constrained", squeeze=False)
    for charts, (found, columns) in zip(axes, parts, strict=True):
        for chart, (column, label) in zip(charts, columns, strict=True):
            bars(chart, found, column)
            chart.set_ylabel(label)
        charts[1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _finish(figure, path, rows[0])


def bars(chart: Axes, rows: Sequence[Row], column: str) -> None:
    """A group of bars per workload, a bar per side that has the column."""
    rows = [row for row in rows if row[column] != ""]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    sides = list(dict.fromkeys(row["side"] for row in rows))
    width = WIDTH / len(sides)
    for i, side in enumerate(sides):
        found = {row["workload"]: row[column] for row in rows if row["side"] == side}
        places = [j + (i - (len(sides) - 1) / 2) * width for j, name in enumerate(workloads) if name in found]
        heights = [found[name] for name in workloads if name in found]
        drawn = chart.bar(places, heights, 0.92 * width, label=side)
        chart.bar_label(drawn, fmt="%.3g", fontsize=6, padding=2)
    chart.set_xticks(range(len(workloads)), workloads)
    chart.margins(y=0.12)
    chart.spines[["top", "right"]].set_visible(False)


def plot_burst(rows: Sequence[Row], path: Path, shared: Row) -> None:
    """Finetuning tokens and milliseconds of every iteration, requests' times per token, over time."""
    steps = [row for row in rows if row["kind"] == "iteration"]
    figure, (tokens, times) = pyplot.subplots(2, 1, figsize=(10, 6), layout="constrained", sharex=True)
    at_s = [row["at_s"] for row in steps]
    tokens.plot(at_s, [row["forward"] for row in steps], ".", ms=3, label="forward")
    tokens.plot(at_s, [row["backward"] for row in steps], ".", ms=3, label="backward")
    tokens.set_ylabel("finetuning tokens per iteration")
    decoding = tokens.twinx()
    decoding.fill_between(at_s, [row["decode"] for row in steps], step="pre", alpha=0.15, color="grey", label="requests")
    decoding.set_ylabel("requests that decode")
    serving = [row for row in steps if row["decode"]]
    times.plot([row["at_s"] for row in serving], [row["ms"] for row in serving], ".", ms=3, label="iteration that decodes")
    for i, row in enumerate(row for row in rows if row["kind"] == "request"):
        label = "time per token of a request" if i == 0 else None
        times.plot([row["at_s"], row["until_s"]], [row["tpot_ms"]] * 2, color="C1", lw=1, alpha=0.7, label=label)
    times.axhline(TPOT_MS, color="grey", lw=1, ls="--", label="target")
    times.set_ylabel("ms")
    times.set_xlabel("seconds")
    times.set_ylim(bottom=0)
    for chart in (tokens, times):
        chart.legend(fontsize=8, frameon=False, loc="upper right")
        chart.spines[["top", "right"]].set_visible(False)
    _finish(figure, path, shared)


def _finish(figure: Any, path: Path, shared: Row) -> None:
    figure.suptitle(f"{shared['model']} on {shared['machine']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
