"""What the servers are asked: HumanEval problems and request files with arrival times and SLO categories. Knows no server.

A request file is a JSON list, maybe gzipped, of {emission_time_ms, prompt, slo_ratio}, as of AdaServe's authors. A ratio below
zero is a TPOT target of that many milliseconds, one above zero a multiple of the peer's unloaded time per token.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORKLOADS = ("code", "chat", "summary")
CHAT_TARGET_MS = 50.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request of a schedule: `at_s` after its start, a user's message, its targets in ms per token and to the first one."""

    at_s: float
    workload: str
    prompt: str
    tpot_ms: float
    ttft_ms: float | None = None


def read_json(path: Path) -> Any:
    """The content of a JSON file or of a gzipped one."""
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())


def humaneval(path: Path) -> list[str]:
    """The prompts of HumanEval's JSON lines, maybe gzipped."""
    return [problem["prompt"] for problem in humaneval_problems(path)]


def humaneval_solutions(path: Path) -> list[str]:
    """The same with their solutions behind them."""
    return [problem["prompt"] + problem["canonical_solution"] for problem in humaneval_problems(path)]


def humaneval_problems(path: Path) -> list[dict[str, str]]:
    """The rows of HumanEval's JSON lines, maybe gzipped."""
    data = path.read_bytes()
    lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
    return [json.loads(line) for line in lines if line]


def workload_of(ratio: float) -> str:
    """The category of a request file's `slo_ratio`."""
    if ratio > 0:
        return "code"
    return "chat" if -ratio <= CHAT_TARGET_MS else "summary"


def prompts(records: Sequence[dict[str, Any]], workload: str) -> list[str]:
    """The different prompts of one category, in order of arrival."""
    return list(dict.fromkeys(record["prompt"] for record in records if workload_of(record["slo_ratio"]) == workload))


def thin(records: Sequence[dict[str, Any]], rate: float, seconds: float, unloaded_tpot_ms: float) -> list[Arrival]:
    """The busiest `seconds` of a request file, with so many of its requests that `rate` come per second, the same each time.

    Raises ValueError when there are fewer.
    """
    times_s = sorted(record["emission_time_ms"] / 1e3 for record in records)
    wanted = round(rate * seconds)
    counts = [bisect_right(times_s, start_s + seconds) - i for i, start_s in enumerate(times_s)]
    if wanted > max(counts):
        raise ValueError(f"{wanted} requests in {seconds} s are asked for, the file has at most {max(counts)}")
    start_s = times_s[counts.index(max(counts))]
    within = [record for record in records if start_s <= record["emission_time_ms"] / 1e3 <= start_s + seconds]
    kept = sorted(random.Random(0).sample(range(len(within)), wanted))
    return [
        Arrival(
            at_s=record["emission_time_ms"] / 1e3 - start_s,
            workload=workload_of(record["slo_ratio"]),
            prompt=record["prompt"],
            tpot_ms=-record["slo_ratio"] if record["slo_ratio"] < 0 else record["slo_ratio"] * unloaded_tpot_ms,
        )
        for record in (within[i] for i in kept)
    ]


def poisson(
    texts: Sequence[str], rate: float, seconds: float, tpot_ms: float, ttft_ms: float, *, seed: int = 0, workload: str = "chat"
) -> list[Arrival]:
    """An open-loop schedule: exponential gaps of mean 1 / `rate` s for `seconds`, prompts in turn, the same ones each time.

    At least one request comes, at the latest in the middle.
    """
    source = random.Random(f"{seed}/{rate}")
    times = [min(source.expovariate(rate), seconds / 2)]
    while (at := times[-1] + source.expovariate(rate)) < seconds:
        times.append(at)
    return [
        Arrival(at_s=at, workload=workload, prompt=texts[i % len(texts)], tpot_ms=tpot_ms, ttft_ms=ttft_ms)
        for i, at in enumerate(times)
    ]
