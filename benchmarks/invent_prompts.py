"""Prompts for `heddle distill --prompts`: the model's own inventions, and the standard library's signatures with docstrings.

    python -m benchmarks.invent_prompts OUT --url http://127.0.0.1:8000

Knows no benchmark's prompts. A chat is what the model samples behind an open user turn; a summary's document, and half of what
asks for code, are sampled behind the words that such requests begin with.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import httpx

from common.chat import ChatTokenizer
from services.cli.convert import convert
from services.cli.distill_data import CONCURRENCY, open_turn
from services.cli.parser import DEFAULT_MODEL

SUMMARY = "Please generate a summarization for the following document.\n\n"
REPORTS = (
    "", "(CNN)", "By ", "A man ", "A woman ", "Police ", "The government ", "Scientists ", "Two ", "He ", "She ",
    "It was ", "When ", "After ", "London ", "The coach ", "The president ", "A new study ", "In the final ", "Fans ",
    "Doctors ", "Last week ", "It is ", "A family ",
)  # fmt: skip
CODE = (
    "Write a Python function that ",
    "Complete this Python function:\nfrom typing import List\n\n\ndef ",
    "Implement a Python class that ",
    "Complete this Python function:\n\ndef ",
    "Explain what this Python code does:\n\n",
)
NUM_TOKENS = {"chat": 120, "summary": 420, "code": 200}


def library_functions() -> Iterator[str]:
    """Signature and docstring of each documented function of the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)) and len(doc) > 60:
                head = f"def {node.name}({ast.unparse(node.args)}):"
                lines = doc.strip().replace('"""', "'''").splitlines()
                yield "\n".join([head, f'    """{lines[0]}', *(f"    {line}".rstrip() for line in lines[1:]), '    """', ""])


def openings(counts: dict[str, int], rng: random.Random) -> Iterator[tuple[str, str, bool]]:
    """(kind, the user's words so far, whether the model is to go on)."""
    functions = list(library_functions())
    rng.shuffle(functions)
    for i in range(max(counts.values())):
        if i < counts["chat"]:
            yield "chat", "", True
        if i < counts["summary"]:
            yield "summary", SUMMARY + rng.choice(REPORTS), True
        if i < counts["code"]:
            if i % 2 == 0 and i // 2 < len(functions):
                yield "code", "Complete this Python function:\n" + functions[i // 2], False
            else:
                yield "code", rng.choice(CODE), True


async def invent(url: str, chat: ChatTokenizer, model: str, counts: dict[str, int], seed: int, out: Path) -> None:
    """Add the prompts to the file as they come."""
    rng = random.Random(seed)
    before, behind = open_turn(chat)
    waiting = openings(counts, rng)
    with out.open("a") as file:
        async with httpx.AsyncClient(base_url=url, timeout=600.0) as client:

            async def work() -> None:
                for kind, words, is_open in waiting:
                    content = words
                    if is_open:
                        body = {
                            "model": model, "prompt": before + words, "max_tokens": NUM_TOKENS[kind], "temperature": 1.0,
                            "top_p": 0.95, "seed": rng.getrandbits(30),
                        }  # fmt: skip
                        response = await client.post("/v1/completions", json=body)
                        if response.is_error:
                            print(f"left out: {response.text[:200]}")
                            continue
                        content += response.json()["choices"][0]["text"]
                    file.write(json.dumps({"kind": kind, "text": before + content + behind}) + "\n")
                    file.flush()

            async with asyncio.TaskGroup() as tasks:
                for _ in range(CONCURRENCY):
                    tasks.create_task(work())


def main() -> None:
    """Read the options and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--chats", type=int, default=500)
    parser.add_argument("--summaries", type=int, default=350)
    parser.add_argument("--codes", type=int, default=350)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = convert(options.model)
    counts = {"chat": options.chats, "summary": options.summaries, "code": options.codes}
    asyncio.run(invent(options.url, ChatTokenizer.load(folder), folder.name, counts, options.seed, options.out))


if __name__ == "__main__":
    main()
