"""Measures this machine's whole slice: speculation against none, chat beside finetuning against chat alone, start-up time.

Run by `make bench`. Two stacks run side by side and are asked in turn, so that both see the same noise; medians are printed.
Results are checked before they are timed: greedy answers of both stacks must start alike (bf16: rounding may part them later).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import openai

from benchmarks.report import line, write_csv
from benchmarks.servers import model_folder, stack
from benchmarks.streams import Sample, client, timed
from services.cli.parser import DEFAULT_MODEL
from tests.stack import Stack, eventually

TPOT_SLO_MS = 150.0
CHATS = (
    "Explain why the sky is blue to a child.",
    "Give me three tips for sleeping better.",
    "What is the difference between a stack and a queue?",
    "Write a short letter to a friend about a trip to the sea.",
)


async def answer(http: httpx.AsyncClient, prompt: str, max_tokens: int) -> Sample:
    """One greedy chat answer, streamed."""
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": max_tokens}
    return await timed(http, "/chat/completions", body, {"x-slo-tpot-ms": str(TPOT_SLO_MS)})


def tokens_per_verify(sample: Sample) -> float:
    """Tokens after the first per pass that verified drafts of this request."""
    return float((sample.num_tokens - 1) / max(1, sample.usage["slo"]["verify_steps"]))


async def in_turn(stacks: dict[str, Stack], prompts: list[str], concurrency: int, rounds: int) -> dict[str, list[Sample]]:
    """Ask every stack the same prompts, `concurrency` at a time, the stacks one after another in each round."""
    samples: dict[str, list[Sample]] = {name: [] for name in stacks}
    async with AsyncExitStack() as opened:
        clients = {name: await opened.enter_async_context(client(s.url)) for name, s in stacks.items()}
        for i in range(rounds):
            batch = [prompts[(i * concurrency + j) % len(prompts)] for j in range(concurrency)]
            for name, http in clients.items():
                samples[name] += await asyncio.gather(*(answer(http, prompt, 128) for prompt in batch))
    return samples


def bench_speculation(model_dir: Path, humaneval: list[dict[str, str]], rounds: int) -> list[dict[str, Any]]:
    """TPOT with draft trees over TPOT without, by workload and concurrency."""
    code = ["Complete this Python function:\n" + problem["prompt"] for problem in humaneval]
    rows = []
    with stack(model_dir) as on, stack(model_dir, "--speculation", "none") as off:
        stacks = {"heddle": on, "none": off}
        asyncio.run(in_turn(stacks, code, 1, 2))
        for workload, prompts in (("code", code), ("chat", list(CHATS))):
            for concurrency in (1, 4):
                samples = asyncio.run(in_turn(stacks, prompts, concurrency, rounds))
                alike = [a.text[:40] == b.text[:40] for a, b in zip(samples["heddle"], samples["none"], strict=True)]
                if sum(alike) < 0.8 * len(alike):
                    raise SystemExit(f"answers differ between the stacks: {alike}")
                tpot = {name: statistics.median(s.tpot_ms for s in found) for name, found in samples.items()}
                rows.append(
                    {
                        "measure": "speculation",
                        "workload": workload,
                        "concurrency": concurrency,
                        "tpot_ms": round(tpot["heddle"], 1),
                        "baseline_tpot_ms": round(tpot["none"], 1),
                        "ratio": round(tpot["heddle"] / tpot["none"], 2),
                        "tokens_per_verify": round(statistics.mean(map(tokens_per_verify, samples["heddle"])), 2),
                    }
                )
    return rows


def start_job(running: Stack, humaneval: list[dict[str, str]], epochs: int) -> str:
    """Upload the problems as chat rows and start a job of rank 16 on all linears; returns its id."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Complete this Python function:\n" + problem["prompt"]},
                {"role": "assistant", "content": problem["canonical_solution"]},
            ]
        }
        for problem in humaneval
    ]
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as api:
        uploaded = api.files.create(file=("humaneval.jsonl", body), purpose="fine-tune")
        job = api.fine_tuning.jobs.create(
            model="smollm2",
            training_file=uploaded.id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs, "batch_size": 4}}},
        )
    return job.id


def finetune_rate(running: Stack, seconds: float) -> float:
    """Training tokens per second that went all the way back, over this time."""

    def done() -> tuple[float, float]:
        counters = httpx.get(f"{running.url}/status", timeout=10).json()["services"]
        found = [s["load"].get("backward_tokens", 0.0) for s in counters if s["name"] == "executor"]
        return sum(found), time.monotonic()

    before, started_at = done()
    time.sleep(seconds)
    after, ended_at = done()
    return (after - before) / (ended_at - started_at)


async def chat_for(running: Stack, seconds: float, concurrency: int) -> list[Sample]:
    """Chat streams back to back for this time."""
    until = time.monotonic() + seconds
    samples: list[Sample] = []

    async def one(http: httpx.AsyncClient, i: int) -> None:
        while time.monotonic() < until:
            samples.append(await answer(http, CHATS[(i + len(samples)) % len(CHATS)], 64))

    async with client(running.url) as http:
        await asyncio.gather(*(one(http, i) for i in range(concurrency)))
    return samples


def bench_coserving(model_dir: Path, humaneval: list[dict[str, str]], seconds: float) -> list[dict[str, Any]]:
    """Chat alone, finetuning alone, and both at once, on one stack."""
    rows = []
    with stack(model_dir) as running:
        asyncio.run(chat_for(running, 5, 2))
        alone = asyncio.run(chat_for(running, seconds, 2))
        start_job(running, humaneval, 50)
        eventually(lambda: finetune_rate(running, 1.0) > 0, 60)
        train_alone = finetune_rate(running, seconds)

        async def both() -> tuple[list[Sample], float]:
            rate = asyncio.create_task(asyncio.to_thread(finetune_rate, running, seconds))
            return await chat_for(running, seconds, 2), await rate

        together, train_together = asyncio.run(both())
    for name, samples, rate in (
        ("chat alone", alone, 0.0),
        ("finetuning alone", [], train_alone),
        ("both", together, train_together),
    ):
        rows.append(
            {
                "measure": "coserving",
                "workload": name,
                "concurrency": 2 if samples else 0,
                "tpot_ms": round(statistics.median(s.tpot_ms for s in samples), 1) if samples else "",
                "attained": round(statistics.mean(s.tpot_ms <= TPOT_SLO_MS for s in samples), 3) if samples else "",
                "ttft_ms": round(statistics.median(s.ttft_ms for s in samples)) if samples else "",
                "finetune_tokens_per_s": round(rate),
            }
        )
    return rows


def bench_startup(model_dir: Path) -> list[dict[str, Any]]:
    """From `heddle up` to the first token, with a state directory that was used before."""
    with tempfile.TemporaryDirectory() as folder:
        Stack(model_dir, Path(folder) / "state").start().stop()
        started_at = time.monotonic()
        running = Stack(model_dir, Path(folder) / "state").start()
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as api:
            api.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
        elapsed_s = time.monotonic() - started_at
        running.stop()
    return [{"measure": "startup", "workload": "second start to first token", "seconds": round(elapsed_s, 1)}]


def main() -> None:
    """Run all, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--humaneval", type=Path, default=Path("tests/data/humaneval20.jsonl"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/slice.csv"))
    options = parser.parse_args()
    folder = model_folder(options.model)
    humaneval = [json.loads(text) for text in options.humaneval.read_text().splitlines()]
    rows = bench_startup(folder) + bench_speculation(folder, humaneval, options.rounds)
    rows += bench_coserving(folder, humaneval, options.seconds)
    write_csv(options.out, rows)
    for row in rows:
        print(line(row))


if __name__ == "__main__":
    main()
