"""What a drafter learns from: prompts, and the served model's own greedy answers to them. Knows HTTP, no tensors."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from common.chat import ChatTemplateError, ChatTokenizer

MAX_ANSWER_TOKENS = 256
MAX_INVENTED_TOKENS = 160
CONCURRENCY = 32
MAX_FAILURES = 8
"""Requests in a row that may fail before it is given up."""
PLACE_OF_CONTENT = "\x02"


class DistillError(ValueError):
    """The drafter cannot be made; the message names the file, the option or the server."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A text in tokens; the model's own answer begins at `num_prompt`."""

    kind: str
    tokens: tuple[int, ...]
    num_prompt: int

    @property
    def num_answer(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - self.num_prompt


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    kind: str
    text: str


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    kind: Any = "given"


def read_prompts(path: Path, chat: ChatTokenizer) -> list[Prompt]:
    """The prompts of a JSONL file: `{"messages": [...]}` or `{"text": "..."}`, a `kind` besides if they are to be told apart.

    Raises DistillError, naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DistillError(f"{path} cannot be read: {error}") from error
    prompts = [_prompt(line, f"{path}, line {number}", chat) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DistillError(f"{path} has no prompt")
    return prompts


def _prompt(line: str, place: str, chat: ChatTokenizer) -> Prompt:
    try:
        row = msgspec.json.decode(line, type=_Row)
        if row.text is not None:
            return Prompt(str(row.kind), row.text)
        if row.messages is None:
            raise DistillError(f"{place}: has neither messages nor a text")
        messages = list(row.messages)
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        return Prompt(str(row.kind), chat.render(messages))
    except (msgspec.DecodeError, UnicodeDecodeError, ChatTemplateError) as error:
        raise DistillError(f"{place}: neither messages of a chat nor a text: {error}") from error


def open_turn(chat: ChatTokenizer) -> tuple[str, str]:
    """What stands before and behind the content of a single user message. Raises DistillError without a chat template."""
    try:
        before, found, behind = chat.render([{"role": "user", "content": PLACE_OF_CONTENT}]).partition(PLACE_OF_CONTENT)
    except ChatTemplateError as error:
        raise DistillError(f"the model cannot invent prompts: {error}; give some with --prompts") from error
    if not found:
        raise DistillError("the chat template hides what a user says: give prompts with --prompts")
    return before, behind


class Collector:
    """Asks a server for answers until there are enough tokens of them."""

    def __init__(self, client: httpx.AsyncClient, model: str, chat: ChatTokenizer, seed: int = 0) -> None:
        """`client` has the server's base URL and key."""
        self._client, self._model, self._chat = client, model, chat
        self._rng = random.Random(seed)
        self._num_failures = 0
        self._num_tokens = 0
        self.examples: list[Example] = []

    async def collect(self, prompts: Sequence[Prompt] | None, num_tokens: int, on_example: Callable[[Example], None]) -> None:
        """Answer each prompt once, or prompts that the model invents itself, until `num_tokens` were answered.

        No more are asked for than should be needed. Raises DistillError if the server does not answer.
        """
        waiting: Iterator[Prompt | None] = itertools.repeat(None) if prompts is None else iter(prompts)
        running: set[asyncio.Task[None]] = set()

        async def work(prompt: Prompt | None) -> None:
            if (example := await self._answer(prompt)) is not None:
                self.examples.append(example)
                on_example(example)

        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    room = max(0, self._num_wanted(num_tokens) - len(running))
                    running |= {tasks.create_task(work(prompt)) for prompt in itertools.islice(waiting, room)}
                    if not running:
                        return
                    _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    def _num_wanted(self, num_tokens: int) -> int:
        """Answers that should be in flight: those still to come are taken to be as long as those so far, first to be long."""
        expected = self._num_tokens / len(self.examples) if self.examples else MAX_ANSWER_TOKENS
        return min(CONCURRENCY, math.ceil(max(0, num_tokens - self._num_tokens) / max(1.0, expected)))

    async def _answer(self, prompt: Prompt | None) -> Example | None:
        try:
            prompt = prompt or await self._invent()
            answer, is_whole = await self._complete(prompt.text, MAX_ANSWER_TOKENS, temperature=0.0)
            self._num_failures = 0
        except (httpx.HTTPError, ValueError) as error:
            self._num_failures += 1
            if self._num_failures >= MAX_FAILURES:
                reason = str(error) or type(error).__name__
                raise DistillError(f"{self._client.base_url}: no answer from {self._model}: {reason}") from error
            return None
        before = self._chat.encode(prompt.text)
        behind = self._chat.encode(answer) + ([self._chat.eos_token_ids[0]] if is_whole and self._chat.eos_token_ids else [])
        self._num_tokens += len(behind)
        return Example(prompt.kind, (*before, *behind), len(before))

    async def _invent(self) -> Prompt:
        """Sampled behind an open user turn: a model that was taught to answer has also seen what is asked."""
        before, behind = open_turn(self._chat)
        content, _ = await self._complete(
            before, MAX_INVENTED_TOKENS, temperature=1.0, top_p=0.95, seed=self._rng.getrandbits(30)
        )
        return Prompt("invented", before + content + behind)

    async def _complete(self, prompt: str, max_tokens: int, **sampling: float) -> tuple[str, bool]:
        """The text, and whether it ended by itself."""
        body = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, **sampling}
        response = await self._client.post("/v1/completions", json=body)
        if response.is_error:
            raise ValueError(f"status {response.status_code}: {response.text[:200]}")
        try:
            (choice,) = response.json()["choices"]
            return str(choice["text"]), choice["finish_reason"] == "stop"
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"this is no completion: {response.text[:200]}") from error
