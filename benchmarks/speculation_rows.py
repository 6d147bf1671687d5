"""What the speculation benchmark measures, its goals, and its arithmetic: answers in, rows out. Pure; knows no server."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.open_loop import Load
from benchmarks.streams import Sample
from benchmarks.workloads import WORKLOADS

OURS, PLAIN, EQUAL = "heddle", "heddle none", "heddle equal"
PEER, PEER_NGRAM = "vllm", "vllm ngram-4"
TOKENS_PER_VERIFY = {"code": 2.8, "chat": 2.2, "summary": 2.2}
"""Heddle's mean, at least."""
TPOT_OVER_PEER = {("code", 1): 0.40, ("chat", 1): 0.50, ("summary", 1): 0.50} | {(name, 8): 0.55 for name in WORKLOADS}
"""Heddle's median over vLLM's, at most."""
TPOT_OVER_NGRAM = 0.70
TPOT_OVER_PLAIN = {32: 1.0}
OTHER_PARTS = 0.05
"""Share of an iteration that is neither drafting nor the verifying pass, at most."""

Answers = Mapping[str, Sequence[Sample]]
"""What each server answered, by its name."""


def tokens_per_verify(server: str, samples: Sequence[Sample], accepted: float) -> float:
    """Mean tokens per pass after the first token. Heddle counts passes; vLLM's follow from its `accepted` draft tokens."""
    after_first = sum(s.num_tokens - 1 for s in samples)
    if server.startswith("heddle"):
        return float(after_first / max(1, sum(s.usage["slo"]["verify_steps"] for s in samples)))
    return after_first / max(1.0, after_first - accepted)


def verify_rows(workload: str, answers: Answers, accepted: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row per server: tokens per verify of one stream at a time."""
    means = {name: tokens_per_verify(name, samples, accepted[name]) for name, samples in answers.items()}
    return [
        {
            "measure": "tokens per verify", "workload": workload, "concurrency": 1, "server": name, "value": round(mean, 2),
            **(judged(mean, TOKENS_PER_VERIFY[workload], at_least=True) if name == OURS else {}),
        }
        for name, mean in means.items()
    ]  # fmt: skip


def tpot_rows(workload: str, concurrency: int, answers: Answers) -> list[dict[str, Any]]:
    """A row per server, its median in ms, and the ratio of Heddle's to it."""
    medians = {name: statistics.median(s.tpot_ms for s in samples if s.num_tokens > 1) for name, samples in answers.items()}
    rows = []
    for name, median in medians.items():
        ratio = medians[OURS] / median
        goal = {
            PEER: TPOT_OVER_PEER.get((workload, concurrency)),
            PEER_NGRAM: TPOT_OVER_NGRAM if concurrency <= 8 else None,
            PLAIN: TPOT_OVER_PLAIN.get(concurrency),
        }.get(name)
        rows.append(
            {
                "measure": "tpot ms", "workload": workload, "concurrency": concurrency, "server": name,
                "value": round(median, 1), "heddle_over_it": round(ratio, 3),
                **({} if goal is None else judged(ratio, goal)),
            }
        )  # fmt: skip
    return rows


def load_rows(file: str, rate: float, loads: Mapping[str, Load]) -> list[dict[str, Any]]:
    """A row per server: attainment in all and by category, goodput and throughput in tokens per second."""
    return [
        {
            "measure": "load", "workload": file, "rate": rate, "server": name, "requests": len(load.outcomes),
            "attainment": round(load.attainment(), 3),
            **{f"attainment_{workload}": round(load.attainment(workload), 3) for workload in WORKLOADS},
            "goodput": round(load.goodput, 1), "throughput": round(load.throughput, 1),
        }
        for name, load in loads.items()
    ]  # fmt: skip


def part_rows(parts_ms: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row per part of Heddle's iterations, its share of their time; what is neither draft nor verify against its goal."""
    total = sum(parts_ms.values())
    other = sum(ms for name, ms in parts_ms.items() if name not in ("draft", "verify")) / total
    rows = [
        {"measure": "share of an iteration", "workload": name, "value": round(ms / total, 4)} for name, ms in parts_ms.items()
    ]
    return [
        *rows,
        {"measure": "share of an iteration", "workload": "all but draft and verify", "value": round(other, 4)}
        | judged(other, OTHER_PARTS),
    ]


def judged(value: float, goal: float, *, at_least: bool = False) -> dict[str, Any]:
    """The goal's columns."""
    return {"goal": goal, "met": "yes" if (value >= goal if at_least else value <= goal) else "no"}
