"""Drafters on greedy answers of the served model to HumanEval and a request file: tokens per verify, and how well they know
how sure they are. The answers are recorded once; drafts are then verified against them, so that no clock has a say.

    python -m benchmarks.bench_drafters --requests FILE --humaneval FILE --draft ngram auto model:FOLDER
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.replay import Recorded, replay
from benchmarks.report import commit, line, write_csv
from benchmarks.servers import START_S, model_folder, unwind_when_terminated
from benchmarks.workloads import WORKLOADS, humaneval, prompts, read_json
from common.chat import ChatTokenizer
from services.cli.distill_data import MAX_ANSWER_TOKENS, Collector, Example, Prompt
from services.cli.distill_target import Target
from services.cli.parser import DEFAULT_MODEL
from services.planner.config import PlannerConfig
from services.planner.drafters import make_drafter
from tests.stack import Stack


def record(folder: Path, asked: Sequence[Prompt], out: Path) -> None:
    """The model's greedy answers, in float32."""
    with tempfile.TemporaryDirectory() as state:
        server = Stack(folder, Path(state), "--dtype", "float32", "--speculation", "none")
        server.start(START_S)
        try:
            name = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]

            async def collect() -> list[Example]:
                async with httpx.AsyncClient(base_url=server.url, timeout=600.0) as client:
                    collector = Collector(client, name, ChatTokenizer.load(folder))
                    await collector.collect(asked, MAX_ANSWER_TOKENS * len(asked), lambda _: None)
                    return collector.examples

            examples = asyncio.run(collect())
        finally:
            server.stop()
    examples.sort(key=lambda example: (example.kind, example.tokens))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(dataclasses.asdict(example)) + "\n" for example in examples))


def read(folder: Path, path: Path, layers: Sequence[int] | None) -> dict[str, list[Recorded]]:
    """The answers by kind, with the target's states after these layers."""
    rows = map(json.loads, path.read_text().splitlines())
    examples = [Example(row["kind"], tuple(row["tokens"]), row["num_prompt"]) for row in rows]
    found: dict[str, list[Recorded]] = {kind: [] for kind in sorted({example.kind for example in examples})}
    if layers is None:
        for example in examples:
            found[example.kind].append(Recorded(example.tokens, example.num_prompt))
        return found
    for trace in Target(folder, layers).traces(examples):
        example, rows_TF = trace.example, trace.features_TF.contiguous().view(torch.int16)
        found[example.kind].append(Recorded(example.tokens, example.num_prompt, rows_TF.numpy().tobytes()))
    return found


def measure(config: PlannerConfig, texts: Mapping[str, Sequence[Recorded]], sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each kind of text and size of tree; each with a drafter that has learned nothing yet."""
    for kind, own in texts.items():
        for num_nodes in sizes:
            drafter = make_drafter(config, is_calibrated=True)
            done = replay(drafter, own, num_nodes=num_nodes, depth=config.max_depth, width=config.max_width)
            yield {
                "workload": kind, "draft": config.draft, "nodes": num_nodes,
                "tokens per verify": round(done.tokens_per_verify, 3), "verified nodes": done.num_nodes,
                "reliability error": round(drafter.reliability.error, 4),
                "answers": done.num_texts, "tokens": done.num_tokens,
            }  # fmt: skip


def main() -> None:
    """Record what is not there yet, replay it for each drafter, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=Path, required=True, help="a request file, for chats and summaries")
    parser.add_argument("--humaneval", type=Path, required=True, help="HumanEval's JSON lines, maybe gzipped")
    parser.add_argument("--draft", nargs="+", default=["ngram", "auto"], help="as of `heddle up --draft`")
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 12], help="sizes of the trees that are verified")
    parser.add_argument("--prompts", type=int, default=12, help="of each workload")
    parser.add_argument("--answers", type=Path, default=Path("build/drafters_answers.jsonl"), help="made if it is not there")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/drafters.csv"))
    options = parser.parse_args()
    unwind_when_terminated()
    folder = model_folder(options.model)
    if not options.answers.exists():
        chat, records = ChatTokenizer.load(folder), read_json(options.requests)
        texts = {"code": humaneval(options.humaneval), **{name: prompts(records, name) for name in WORKLOADS[1:]}}
        asked = [
            Prompt(kind, chat.render([{"role": "user", "content": text}]))
            for kind, own in texts.items()
            for text in own[: options.prompts]
        ]
        record(folder, asked, options.answers)
    shared = {"model": folder.name, "commit": commit()}
    rows: list[dict[str, Any]] = []
    by_layers: dict[tuple[int, ...] | None, dict[str, list[Recorded]]] = {}
    for draft in options.draft:
        config = PlannerConfig(draft=draft, model_dir=str(folder))
        need = make_drafter(config, is_calibrated=True).need
        layers = None if need is None else need.layers
        if layers not in by_layers:
            by_layers[layers] = read(folder, options.answers, layers)
        for row in measure(config, by_layers[layers], options.nodes):
            print(line(row), flush=True)
            rows.append({**row, **shared})
            write_csv(options.out, rows)


if __name__ == "__main__":
    main()
