"""Finetuning alone, beside peft on the same cores: tokens per second, peak memory beyond the weights. Knows no server.

Every side is a process of its own; all get the same batches, in turn. Before anything is timed the first losses are compared:
adapters start at zero, so that all sides must compute the same one. The floor computes none: it tells what a device can do.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.finetune_sides import FLOOR, HEDDLE, PEFT, PEFT_CHECKPOINTING

MEASURE = "finetuning alone"
BATCH_SIZE = 4
LONG = 512
LOSS_TOLERANCE = 0.02
"""bf16 rounds differently in each library."""
SPEED_OVER_PEFT = 2.0
MEMORY_OF_PEFT = 0.25
Batches = list[list[list[int]]]


class Process:
    """A side that computes a step when asked."""

    def __init__(self, side: str, folder: Path, dtype: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.finetune_sides", side, str(folder), dtype, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def ask(self, batch: list[list[int]]) -> dict[str, Any]:
        """The result of a step."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(batch) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line; ends the program when the process ended instead."""
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if text.startswith("{"):
                answer: dict[str, Any] = json.loads(text)
                return answer
        raise SystemExit(f"a side ended with {self._process.wait()}")

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def batches(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, Batches]:
    """By workload: problems with their solutions as they are, and all of them in pieces of LONG tokens."""
    sequences = [tokenizer.encode(text).ids for text in texts]
    stream = [token for tokens in sequences for token in tokens]
    pieces = [stream[i : i + LONG] for i in range(0, len(stream) - LONG + 1, LONG)]
    found = {"humaneval": sequences, f"{LONG} tokens": pieces}
    return {
        name: [list(items[i : i + BATCH_SIZE]) for i in range(0, len(items) - BATCH_SIZE + 1, BATCH_SIZE)]
        for name, items in found.items()
    }


@contextmanager
def running(folder: Path, dtypes: Mapping[str, str], threads: int) -> Iterator[dict[str, Process]]:
    """All sides, loaded, each in its type; new ones for every workload, so that peaks of memory are its own."""
    with ExitStack() as started:
        processes = {}
        for side, dtype in dtypes.items():
            processes[side] = Process(side, folder, dtype, threads)
            started.callback(processes[side].stop)
        yield processes


def measure(processes: dict[str, Process], work: Batches, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Each round is a step of every side with the same batch; the first round is not timed, but compared."""
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for i in range(rounds + 1):
        for side, process in sorted(processes.items(), reverse=bool(i % 2)):
            results[side].append(process.ask(work[i % len(work)]))
        if i == 0:
            check({side: found[0]["loss"] for side, found in results.items() if side != FLOOR})
    return {side: found[1:] for side, found in results.items()}


def check(losses: dict[str, float]) -> None:
    """Ends the program when the first losses differ."""
    if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE * min(losses.values()):
        raise SystemExit(f"the sides do not compute the same: first losses {losses}")


def rows_of(workload: str, results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row per side: medians, ratios of Heddle's to it, and goals."""
    speed = {side: statistics.median(step["tokens"] / step["seconds"] for step in steps) for side, steps in results.items()}
    memory = {side: max(step["bytes_beyond_weights"] for step in steps) for side, steps in results.items()}
    rows = []
    for side in results:
        if side == FLOOR:
            rows.append(_floor_row(workload, speed[HEDDLE], speed[FLOOR], len(results[FLOOR])))
            continue
        faster, share = speed[HEDDLE] / speed[side], memory[HEDDLE] / memory[side]
        goals = {
            PEFT: faster >= SPEED_OVER_PEFT and share <= MEMORY_OF_PEFT,
            PEFT_CHECKPOINTING: faster >= SPEED_OVER_PEFT and share <= 1.0,
        }
        rows.append(
            {
                "measure": MEASURE, "workload": workload, "side": side, "tokens_per_s": round(speed[side], 1),
                "mb_beyond_weights": round(memory[side] / 1e6), "heddle_over_it": round(faster, 2),
                "heddle_memory_over_its": round(share, 2), "met": "" if side == HEDDLE else "yes" if goals[side] else "no",
                "rounds": len(results[side]),
            }
        )  # fmt: skip
    return rows


def _floor_row(workload: str, speed: float, floor: float, num_rounds: int) -> dict[str, Any]:
    """Its memory and its goal are those of no side."""
    return {
        "measure": MEASURE, "workload": workload, "side": FLOOR, "tokens_per_s": round(floor, 1), "mb_beyond_weights": "",
        "heddle_over_it": round(speed / floor, 2), "heddle_memory_over_its": "", "met": "", "rounds": num_rounds,
    }  # fmt: skip
