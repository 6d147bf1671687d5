"""Draws the speculation benchmark's rows: attainment and goodput against rate, a line per server. Knows rows, not servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Row = Mapping[str, Any]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the picture, a row of two charts per request file; the file's suffix chooses its format."""
    loads = [row for row in rows if row["measure"] == "load"]
    files = list(dict.fromkeys(row["workload"] for row in loads))
    if not files:
        return
    figure, axes = pyplot.subplots(len(files), 2, figsize=(10, 3.6 * len(files)), layout="constrained", squeeze=False)
    for file, (left, right) in zip(files, axes, strict=True):
        found = [row for row in loads if row["workload"] == file]
        for name in dict.fromkeys(row["server"] for row in found):
            mine = sorted((row for row in found if row["server"] == name), key=lambda row: row["rate"])
            rates = [row["rate"] for row in mine]
            style = {"marker": "o", "ms": 3, "lw": 2 if name == "heddle" else 1, "ls": "--" if name.startswith("vllm") else "-"}
            left.plot(rates, [100 * row["attainment"] for row in mine], label=name, **style)
            right.plot(rates, [row["goodput"] for row in mine], label=name, **style)
        left.set_ylabel("requests that met their target, %")
        left.set_title(file, fontsize=9)
        left.set_ylim(0, 103)
        right.set_ylabel("goodput, tokens/s")
        for chart in (left, right):
            chart.set_xlabel("requests per second")
            chart.spines[["top", "right"]].set_visible(False)
        right.legend(fontsize=7, frameon=False)
    figure.suptitle(f"{rows[0]['model']} on {rows[0]['machine']}; vLLM {rows[0]['vllm']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
