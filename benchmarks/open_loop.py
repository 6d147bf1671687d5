"""Sends requests at their times, whatever becomes of them, and judges each by its target. Knows HTTP, not the server."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks.streams import TIMEOUT_S, Sample, client, timed
from benchmarks.workloads import Arrival


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request; `sample` is None where the server refused it or we waited in vain."""

    arrival: Arrival
    sample: Sample | None

    @property
    def attained(self) -> bool:
        """Whether it was answered, its mean time per token after the first within its target, and the first in time."""
        if self.sample is None or self.sample.tpot_ms > self.arrival.tpot_ms:
            return False
        return self.arrival.ttft_ms is None or self.sample.ttft_ms <= self.arrival.ttft_ms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """All outcomes of one schedule; `seconds` from its start (since the epoch) to the last answer's end."""

    outcomes: tuple[Outcome, ...]
    seconds: float
    started_at: float = 0.0

    def attainment(self, workload: str | None = None) -> float:
        """Share of requests that met their target; refused ones did not."""
        found = [o.attained for o in self.outcomes if workload in (None, o.arrival.workload)]
        return sum(found) / len(found) if found else float("nan")

    @property
    def goodput(self) -> float:
        """Tokens per second of the requests that met their target."""
        return sum(o.sample.num_tokens for o in self.outcomes if o.attained and o.sample) / self.seconds

    @property
    def throughput(self) -> float:
        """Tokens per second of all requests."""
        return sum(o.sample.num_tokens for o in self.outcomes if o.sample) / self.seconds


async def chat(
    http: httpx.AsyncClient,
    prompt: str,
    max_tokens: int,
    tpot_ms: float | None = None,
    ttft_ms: float | None = None,
    is_exact: bool = False,
    salt: str | None = None,
) -> Sample:
    """One greedy answer to one user's message, streamed, to its end or `max_tokens`; or, exact, of just that length. What was
    asked under another `salt` helps neither caches nor drafts.

    Raises ValueError for an exact answer of another length.
    """
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        **({} if salt is None else {"cache_salt": salt}),
    }
    targets = {"x-slo-tpot-ms": tpot_ms, "x-slo-ttft-ms": ttft_ms}
    headers = {name: f"{value:.3f}" for name, value in targets.items() if value is not None}
    sample = await timed(http, "/chat/completions", body | ({"ignore_eos": True} if is_exact else {}), headers)
    if is_exact and sample.num_tokens != max_tokens:
        raise ValueError(f"{max_tokens} tokens were asked for, the answer has {sample.num_tokens}")
    return sample


async def send(
    url: str,
    arrivals: Sequence[Arrival],
    max_tokens: int,
    *,
    is_exact: bool = False,
    patience_s: float = TIMEOUT_S,
    salt: str | None = None,
) -> Load:
    """Every request at its time; returns when all are answered, or `patience_s` after the last one came.

    Raises ValueError for a broken stream.
    """

    async def one(http: httpx.AsyncClient, arrival: Arrival, started_at: float) -> Outcome:
        await asyncio.sleep(started_at + arrival.at_s - time.monotonic())
        try:
            async with asyncio.timeout_at(started_at + arrivals[-1].at_s + patience_s):
                sample = await chat(http, arrival.prompt, max_tokens, arrival.tpot_ms, arrival.ttft_ms, is_exact, salt)
        except (httpx.HTTPStatusError, TimeoutError):
            return Outcome(arrival=arrival, sample=None)
        return Outcome(arrival=arrival, sample=sample)

    async with client(url) as http:
        started_at, began_at = time.monotonic(), time.time()
        outcomes = await asyncio.gather(*(one(http, arrival, started_at) for arrival in arrivals))
    return Load(outcomes=tuple(outcomes), seconds=time.monotonic() - started_at, started_at=began_at)


async def closed(
    url: str, prompts: Sequence[str], concurrency: int, max_tokens: int, *, salt: str | None = None
) -> list[Sample]:
    """All prompts, `concurrency` at a time; the answers in the order of the prompts."""
    turns = asyncio.Semaphore(concurrency)

    async def one(http: httpx.AsyncClient, prompt: str) -> Sample:
        async with turns:
            return await chat(http, prompt, max_tokens, salt=salt)

    async with client(url) as http:
        return list(await asyncio.gather(*(one(http, prompt) for prompt in prompts)))
