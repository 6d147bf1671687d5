"""Measures when it pays to let two halves of the requests take turns (`--cohorts 2`), so that drafts for one half
are made while the other half's are verified.

Run by `make bench-cohorts`. Two stacks side by side are asked in turn with the same prompts, greedily; at each size their
answers have to be the same before any are timed, and afterwards. Knows no other server.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.open_loop import closed
from benchmarks.report import commit, line, machine, write_csv
from benchmarks.servers import model_folder, settle, unwind_when_terminated
from benchmarks.speculation_rows import OURS, tokens_per_verify
from benchmarks.streams import Sample
from benchmarks.workloads import WORKLOADS, humaneval, prompts, read_json
from services.cli.parser import DEFAULT_MODEL
from tests.stack import Stack

SIDES = ("1", "2")
"""Cohorts."""
CONCURRENCIES = (4, 8, 16)
MAX_TOKENS = 96


def check(answers: Mapping[str, Sequence[Sample]]) -> None:
    """Ends the program unless both sides say the same."""
    one, two = (answers[side] for side in SIDES)
    if parted := sum(a.text != b.text for a, b in zip(one, two, strict=True)):
        raise SystemExit(f"{parted} of {len(one)} answers depend on the number of cohorts")


def rows_of(concurrency: int, answers: Mapping[str, Sequence[Sample]]) -> list[dict[str, Any]]:
    """A row per side: its median time per token and its tokens per verify; the second also over the first."""
    medians = {side: statistics.median(s.tpot_ms for s in found if s.num_tokens > 1) for side, found in answers.items()}
    return [
        {
            "measure": "tpot ms", "concurrency": concurrency, "cohorts": side, "value": round(median, 1),
            "tokens_per_verify": round(tokens_per_verify(OURS, answers[side], 0.0), 2), "requests": len(answers[side]),
            **({} if side == SIDES[0] else {"over_one": round(median / medians[SIDES[0]], 3)}),
        }
        for side, median in medians.items()
    ]  # fmt: skip


def measure(
    servers: Mapping[str, Stack], texts: Sequence[str], concurrency: int, num_rounds: int, until: float = math.inf
) -> dict[str, list[Sample]]:
    """So many batches of `concurrency` prompts on each side, in turn, each side first as often as the other.

    No second batch is begun after `until`, of time.monotonic.
    """
    answers: dict[str, list[Sample]] = {side: [] for side in SIDES}
    salt = uuid.uuid4().hex
    for i in range(num_rounds):
        if i and time.monotonic() > until:
            break
        batch = [texts[(i * concurrency + j) % len(texts)] for j in range(concurrency)]
        for side in SIDES[:: -1 if i % 2 else 1]:
            settle()
            answers[side] += asyncio.run(closed(servers[side].url, batch, concurrency, MAX_TOKENS, salt=salt))
    return answers


def parse() -> argparse.Namespace:
    """The options, with --quick put into effect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=Path, required=True, help="a request file, for chats and summaries")
    parser.add_argument("--humaneval", type=Path, required=True, help="HumanEval's JSON lines, maybe gzipped")
    parser.add_argument("--dtype", default="float32", help="bfloat16 where Heddle's compiled operations do all the work")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=8.0, help="starts included; rounds that do not fit in are left out")
    parser.add_argument("--quick", action="store_true", help="one round of one size")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/cohorts.csv"))
    options = parser.parse_args()
    options.concurrencies = CONCURRENCIES
    if options.quick:
        options.rounds, options.concurrencies = 1, CONCURRENCIES[1:2]
    return options


def main() -> None:
    """Run all, print the rows, write the CSV."""
    options = parse()
    until = time.monotonic() + 60 * options.minutes
    unwind_when_terminated()
    folder, records = model_folder(options.model), read_json(options.requests)
    found = [humaneval(options.humaneval), *(prompts(records, name) for name in WORKLOADS[1:])]
    texts = [text for group in zip(*(each[:24] for each in found), strict=False) for text in group]
    shared = {"machine": machine(), "model": folder.name, "dtype": options.dtype, "commit": commit()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as state, ExitStack() as started:
        servers = {}
        for side in SIDES:
            flags = ("--dtype", options.dtype, "--no-prefix-cache", "--cohorts", side)
            servers[side] = Stack(folder, Path(state, side), *flags).start()
            started.callback(servers[side].stop)
        for i, concurrency in enumerate(options.concurrencies):
            share_s = (until - time.monotonic()) / (len(options.concurrencies) - i)
            ends_at = time.monotonic() + share_s
            check(measure(servers, texts[::-1], concurrency, 1))
            answers = measure(servers, texts, concurrency, options.rounds, ends_at)
            check(answers)
            for row in rows_of(concurrency, answers):
                print(line(row), flush=True)
                rows.append({**row, **shared})
            write_csv(options.out, rows)


if __name__ == "__main__":
    main()
