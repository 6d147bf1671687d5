"""Compares the samples of two lm-eval runs, for example of `hf` and of Heddle. Knows lm-eval's sample files, not models.

python benchmarks/lm_eval/compare.py ONE OTHER: output paths of runs with --log_samples; exit status 1 when they differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOLERANCE = 1e-3
"""Of a log likelihood, the sum over an answer's tokens."""


def samples(folder: Path) -> dict[tuple[int, int], tuple[float, bool]]:
    """(log likelihood, whether greedy) of each item's answers, from the newest run in the folder."""
    files = sorted(folder.rglob("samples_*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        sys.exit(f"{folder}: no samples_*.jsonl; run lm_eval with --log_samples")
    rows: list[dict[str, Any]] = [json.loads(line) for line in files[-1].read_text().splitlines()]
    return {
        (row["doc_id"], place): (float(answer[0]), str(answer[1]) == "True")
        for row in rows
        for place, answer in enumerate(row["filtered_resps"])
    }


def main(one: str, other: str) -> int:
    """Prints the largest difference."""
    left, right = samples(Path(one)), samples(Path(other))
    if left.keys() != right.keys():
        sys.exit("the runs hold different items")
    largest = max(abs(left[key][0] - right[key][0]) for key in left)
    num_greedy = sum(left[key][1] != right[key][1] for key in left)
    items = len({doc for doc, _ in left})
    print(
        f"{items} items, {len(left)} answers: largest difference of a log likelihood {largest:.2e}, of is_greedy {num_greedy}"
    )
    return int(largest > TOLERANCE or num_greedy > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
