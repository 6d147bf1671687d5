"""What the co-serving benchmark measures, its goals, and its arithmetic: outcomes and pieces of work in, rows out. Pure.

A request attains its target when its first token comes within TTFT_MS and its mean time per token after that is within TPOT_MS.
Finetuning counts by tokens that were trained, which on Heddle's sides are those that went all the way back.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from benchmarks.open_loop import Load

OURS, SEPARATE, UNTRAINED = "heddle", "separate cores", "no finetuning"
TPOT_MS, TTFT_MS = 150.0, 5000.0
OVER_SEPARATE = {"light": 2.5, "heavy": 1.9}
"""Heddle's finetuning speed over the separate set-up's, at least, where it attains as much."""
KEPT = 0.76
"""Share of the finetuning speed at the lightest load that is kept at the heaviest with ENOUGH attainment, at least."""
ENOUGH = 0.9
LOSS_TOLERANCE = 0.03
"""Of the mean loss of the first steps: adapters start at random, and types round."""
MEASURE = "co-serving"
BUSY = "share of the time that iterations of inference alone take"


class Piece(NamedTuple):
    """Training that was done evenly over this time, in seconds since the epoch."""

    started_at: float
    ended_at: float
    tokens: float


class Iteration(NamedTuple):
    """What an executor logs of one: when it ended, how long it took, and its tokens."""

    ended_at: float
    ms: float
    decode: int
    prefill: int
    forward: float
    backward: float


def iterations(log: Iterable[str]) -> list[Iteration]:
    """Those of an executor's log."""
    found = []
    for text in log:
        if '"event": "iteration"' not in text:
            continue
        line = json.loads(text)
        at = datetime.fromisoformat(line["timestamp"]).timestamp()
        found.append(Iteration(at, line["ms"], line["decode"], line["prefill"], line["finetune"], line["backward"]))
    return found


def pieces(found: Iterable[Iteration]) -> list[Piece]:
    """What iterations trained."""
    return [Piece(each.ended_at - each.ms / 1e3, each.ended_at, each.backward) for each in found if each.backward]


def tokens_between(work: Iterable[Piece], start: float, end: float) -> float:
    """Tokens of the pieces' parts within this time."""
    total = 0.0
    for piece in work:
        shared = min(end, piece.ended_at) - max(start, piece.started_at)
        if shared > 0:
            total += piece.tokens * shared / (piece.ended_at - piece.started_at)
    return total


def load_row(name: str, rate: float, side: str, load: Load, work: Iterable[Piece]) -> dict[str, Any]:
    """One side at one rate."""
    samples = [outcome.sample for outcome in load.outcomes if outcome.sample is not None]
    trained = tokens_between(work, load.started_at, load.started_at + load.seconds)
    return {
        "measure": MEASURE, "workload": name, "rate": rate, "side": side, "requests": len(load.outcomes),
        "unanswered": len(load.outcomes) - len(samples), "attainment": round(load.attainment(), 3),
        "ttft_ms": round(statistics.median(s.ttft_ms for s in samples)) if samples else "",
        "tpot_ms": round(statistics.median(s.tpot_ms for s in samples), 1) if samples else "",
        "inference_tokens_per_s": round(load.throughput, 1), "tokens_per_s": round(trained / load.seconds, 1),
    }  # fmt: skip


def busy_row(name: str, rate: float, load: Load, found: Iterable[Iteration]) -> dict[str, Any]:
    """The share of the time that iterations take at one rate where nothing is trained."""
    start, end = load.started_at, load.started_at + load.seconds
    spans = [(max(start, each.ended_at - each.ms / 1e3), min(end, each.ended_at)) for each in found]
    busy_s = sum(max(0.0, last - first) for first, last in spans)
    return {
        "measure": BUSY, "workload": name, "rate": rate, "side": UNTRAINED, "attainment": round(load.attainment(), 3),
        "value": round(busy_s / load.seconds, 3),
    }  # fmt: skip


def judged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all sides with the ratio of Heddle's finetuning speed to each, and goals; then what Heddle itself keeps."""
    ours = {row["workload"]: row for row in rows if row["side"] == OURS}
    judged_rows = []
    for row in rows:
        mine = ours.get(row["workload"])
        extra: dict[str, Any] = {}
        if mine is not None and row["tokens_per_s"] > 0:
            extra["heddle_over_it"] = round(mine["tokens_per_s"] / row["tokens_per_s"], 2)
        if row["side"] == SEPARATE and row["workload"] in OVER_SEPARATE and mine is not None:
            extra["goal"] = OVER_SEPARATE[row["workload"]]
            is_faster = extra.get("heddle_over_it", float("inf")) >= extra["goal"]
            extra["met"] = "yes" if is_faster and mine["attainment"] >= row["attainment"] else "no"
        judged_rows.append({**row, **extra})
    return judged_rows + kept_rows(list(ours.values()))


def kept_rows(ours: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Heddle's finetuning speed at the heaviest rate that it attains ENOUGH at, over that at the lightest; needs two rates."""
    by_rate = sorted(ours, key=lambda row: float(row["rate"]))
    heaviest = next((row for row in reversed(by_rate) if row["attainment"] >= ENOUGH), None)
    if len(by_rate) < 2 or heaviest is None or not by_rate[0]["tokens_per_s"]:
        return []
    kept = heaviest["tokens_per_s"] / by_rate[0]["tokens_per_s"]
    return [
        {
            "measure": f"finetuning kept at the heaviest load with {ENOUGH:.0%} attainment", "workload": heaviest["workload"],
            "rate": heaviest["rate"], "side": OURS, "value": round(kept, 3), "goal": KEPT,
            "met": "yes" if kept >= KEPT else "no",
        }
    ]  # fmt: skip


def check_losses(side: str, losses: Sequence[float], peer: Sequence[float]) -> None:
    """Ends the program unless a side's first losses are the peer's on the same data in the same order, and fall if those do."""
    if len(losses) != len(peer) or len(losses) < 2:
        raise SystemExit(f"{side}: {len(losses)} losses to compare with {len(peer)}")
    if _falls(peer) and not _falls(losses):
        raise SystemExit(f"{side}: the loss does not fall: {losses}")
    for what, mine, theirs in (
        ("first loss is", losses[0], peer[0]),
        ("mean loss is", statistics.mean(losses), statistics.mean(peer)),
    ):
        if abs(mine - theirs) > LOSS_TOLERANCE * theirs:
            raise SystemExit(f"{side} does not train as peft does: its {what} {mine:.4f}, not {theirs:.4f}: {losses} {peer}")


def _falls(losses: Sequence[float]) -> bool:
    half = len(losses) // 2
    return statistics.mean(losses[half:]) < statistics.mean(losses[:half])


def burst_rows(found: Iterable[Iteration], start: float, end: float) -> list[dict[str, Any]]:
    """A row per iteration within this time, its end in seconds after the start."""
    return [
        {
            "at_s": round(each.ended_at - start, 3), "ms": each.ms, "decode": each.decode, "prefill": each.prefill,
            "forward": each.forward, "backward": each.backward,
        }
        for each in found
        if start <= each.ended_at <= end
    ]  # fmt: skip


def request_rows(load: Load) -> list[dict[str, Any]]:
    """A row per answered request: from its first token to its last, in seconds after the schedule's start, and its mean."""
    return [
        {
            "kind": "request", "at_s": round(o.arrival.at_s + o.sample.ttft_ms / 1e3, 3), "tpot_ms": round(o.sample.tpot_ms, 1),
            "until_s": round(o.arrival.at_s + (o.sample.ttft_ms + o.sample.tpot_ms * (o.sample.num_tokens - 1)) / 1e3, 3),
            "ttft_ms": round(o.sample.ttft_ms, 1),
        }
        for o in load.outcomes
        if o.sample is not None
    ]  # fmt: skip
