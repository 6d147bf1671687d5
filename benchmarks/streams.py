"""Streams completions and chats as a client sees them, and times them. Knows HTTP, not which server answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx

MODEL = "smollm2"
"""What every server under test is told to call its model."""
TIMEOUT_S = 600.0


class Sample(NamedTuple):
    """One streamed answer as the client saw it; `tpot_ms` is the mean time per token after the first."""

    text: str
    ttft_ms: float
    tpot_ms: float
    num_tokens: int
    usage: Mapping[str, Any]


def client(url: str) -> httpx.AsyncClient:
    """A client with room for as many streams as anyone opens."""
    return httpx.AsyncClient(base_url=f"{url}/v1", timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None))


async def complete(client: httpx.AsyncClient, prompt: Sequence[int], num_tokens: int) -> Sample:
    """Exactly `num_tokens` greedy tokens after these token ids."""
    body = {"prompt": list(prompt), "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
    return await timed(client, "/completions", body)


async def complete_all(url: str, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Sample]:
    """All at once; the answers in the order of the prompts."""
    async with client(url) as http:
        return await asyncio.gather(*(complete(http, prompt, num_tokens) for prompt in prompts))


async def timed(
    client: httpx.AsyncClient, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Sample:
    """Stream one answer. Lines are only read off while it runs, and parsed afterwards: clients and servers share the cores.

    Raises httpx.HTTPStatusError for a refusal and ValueError for a stream that breaks off or holds an error.
    """
    body = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **body}
    lines: list[tuple[float, str]] = []
    sent_at = time.monotonic()
    async with client.stream("POST", path, json=body, headers=headers) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line:
                lines.append((time.monotonic(), line))
    return sample(sent_at, lines)


def sample(sent_at: float, lines: Sequence[tuple[float, str]]) -> Sample:
    """What the lines of a stream of server-sent events say, each with its time in seconds."""
    if not lines or lines[-1][1] != "data: [DONE]":
        raise ValueError(f"the stream broke off: {[line for _, line in lines[-1:]]}")
    times: list[float] = []
    text = ""
    usage: dict[str, Any] = {}
    for at, line in lines[:-1]:
        chunk = json.loads(line.removeprefix("data:"))
        if "error" in chunk:
            raise ValueError(f"the stream ended with {chunk['error']}")
        for choice in chunk["choices"]:
            times.append(at)
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        usage = chunk.get("usage") or usage
    num_tokens: int = usage["completion_tokens"]
    tpot_ms = (times[-1] - times[0]) / max(1, num_tokens - 1) * 1e3
    return Sample(text, (times[0] - sent_at) * 1e3, tpot_ms, num_tokens, usage)
