"""`heddle distill`: a drafter for any model, from prompts to a folder with a card. Imports torch only when it trains."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import httpx
from rich.progress import Progress

from common.chat import ChatTokenizer
from kernels.drafting.folder import CONFIG
from services.cli.convert import convert
from services.cli.distill_data import Collector, DistillError, Example, read_prompts
from services.cli.progress import TaskProgress

EVALUATED_SHARE = 0.03
ANSWERS = "answers.jsonl"
"""What was generated is kept beside the drafter: training again does not need it again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """The options of `heddle distill`."""

    model: str
    out: Path
    url: str
    api_key: str | None = None
    served_model_name: str | None = None
    prompts: Path | None = None
    start: Path | None = None
    num_tokens: int = 300_000
    vocabulary: int = 10_240
    epochs: float = 4.0
    threads: int | None = None
    seed: int = 0


def distill(options: DistillOptions, client: httpx.AsyncClient | None = None) -> str:
    """Make a drafter; returns its card. Raises DistillError, ModelError. `client` replaces the one for `options.url`."""
    _check_room(options.out)
    folder = convert(options.model)
    if options.start is not None:
        from services.cli.distill_make import started_drafter  # needs torch; now, as answers take long

        started_drafter(options.start, folder)
    chat = ChatTokenizer.load(folder)
    options.out.mkdir(parents=True, exist_ok=True)
    with TaskProgress() as progress:
        examples = _collected(options, folder, chat, client, progress)
        return _train(options, folder, examples, progress)


def _check_room(out: Path) -> None:
    """Raises DistillError unless a drafter can be written there."""
    if out.exists() and not out.is_dir():
        raise DistillError(f"{out} is not a folder; name another one with --out")
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    if CONFIG in found:
        raise DistillError(
            f"{out} is not empty: it holds a drafter, which `heddle up --draft ngram,features:{out}` uses; name another folder"
            f" with --out, with --start {out} to train this one on, or leave only {ANSWERS} in it to train anew"
        )
    if found - {ANSWERS}:
        raise DistillError(f"{out} is not empty; name a new folder with --out")


def _kept(path: Path) -> list[Example]:
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        with path.open("r+b") as file:  # an interruption tore the last line
            file.truncate(len(whole.encode()))
    rows = [json.loads(line) for line in whole.splitlines()]
    return [Example(row["kind"], tuple(row["tokens"]), row["num_prompt"]) for row in rows]


def _collected(
    options: DistillOptions, folder: Path, chat: ChatTokenizer, client: httpx.AsyncClient | None, progress: Progress
) -> list[Example]:
    """The answers that are kept, and as many more as are wanted, each kept as it comes."""
    prompts = None if options.prompts is None else read_prompts(options.prompts, chat)
    kept = _kept(options.out / ANSWERS)
    num_kept = sum(example.num_answer for example in kept)
    if prompts is not None:
        answered = {example.tokens[: example.num_prompt] for example in kept}
        prompts = [prompt for prompt in prompts if tuple(chat.encode(prompt.text)) not in answered]
    task = progress.add_task("answers", total=options.num_tokens, completed=num_kept, note="")
    headers = {} if options.api_key is None else {"authorization": f"Bearer {options.api_key}"}
    client = client or httpx.AsyncClient(base_url=options.url, headers=headers, timeout=600.0)
    seed = options.seed + len(kept)  # what was invented before is not invented again
    collector = Collector(client, options.served_model_name or folder.name, chat, seed)

    async def collect(file: TextIO) -> None:
        def keep(example: Example) -> None:
            file.write(json.dumps(dataclasses.asdict(example)) + "\n")
            file.flush()
            progress.update(task, advance=example.num_answer)

        async with client:
            await collector.collect(prompts, options.num_tokens - num_kept, keep)

    if num_kept < options.num_tokens:
        with (options.out / ANSWERS).open("a") as file:
            asyncio.run(collect(file))
    if not (examples := kept + collector.examples):
        raise DistillError("no answers: --tokens or the prompts are too few")
    return examples


def _train(options: DistillOptions, folder: Path, examples: Sequence[Example], progress: Progress) -> str:
    from services.cli.distill_make import make  # needs torch and transformers

    return make(
        folder, examples, options.out, progress,
        vocabulary_size=options.vocabulary, epochs=options.epochs, threads=options.threads, seed=options.seed,
        evaluated_share=EVALUATED_SHARE, origin="its own inventions" if options.prompts is None else options.prompts.name,
        start=options.start,
    )  # fmt: skip
