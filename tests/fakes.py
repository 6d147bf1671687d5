"""Stand-ins for the gateway's neighbours on a real bus: an executor, its admission, and a tiny model folder."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nats.aio.subscription import Subscription
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common import subjects
from common.bus import Bus
from common.messages import (
    Admitted,
    Beat,
    Cancel,
    ExecutorLoad,
    FinishReason,
    InferenceRequest,
    LatencyProfile,
    Logprobs,
    Rejected,
    ServiceState,
    TokenChunk,
    Usage,
)

MODEL = "tiny"
REPLY = "Hello w\u00f6rld, one two three!<|im_end|>"
SAID = REPLY.removesuffix("<|im_end|>")
EOS = "<|im_end|>"
BEAT_S = 0.05
"""How often fakes beat; what they say of their period is up to the test: dead after three periods of silence."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "The loom lifts the warp threads so that the weft can pass between them.",
    "A heddle is the part of a loom that guides one thread of the warp.",
    "system user assistant hello world, one two three four five six seven eight nine ten.",
)


def write_tiny_model(folder: Path) -> Path:
    """A folder with what the gateway reads of a model: byte-level BPE of a few hundred words, and a ChatML template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": EOS, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"eos_token_id": tokenizer.token_to_id(EOS), "vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fake_logprobs(tokens: Sequence[int], num_top: int | None) -> Logprobs | None:
    """Token t has the logprob -t / 64, its alternatives are the tokens 2, 3, ... with -1, -2, ...; None if nobody asks."""
    if num_top is None:
        return None
    return Logprobs(
        chosen=tuple(-token / 64 for token in tokens),
        num_top=num_top,
        top_tokens=tuple(2 + place for _ in tokens for place in range(num_top)),
        top_logprobs=tuple(-1.0 - place for _ in tokens for place in range(num_top)),
    )


@dataclass(eq=False)
class FakeExecutor:
    """Says the same `reply` to everyone, one chunk after the other, and keeps what it was asked.

    It is silent from chunk `stall_at` of `num_stalls` answers on, leaves chunk `skip` out of `num_skips` answers, and fails at
    chunk `fail_at`.
    """

    bus: Bus
    reply: Sequence[int]
    executor_id: str = "executor-1"
    model: str = MODEL
    adapters: tuple[str, ...] = ()
    load_fields: dict[str, Any] = field(default_factory=dict)
    max_model_len: int = 512
    chunk_size: int = 1
    stall_at: int | None = None
    num_stalls: int = 1000
    skip: int | None = None
    num_skips: int = 1000
    fail_at: int | None = None
    state: ServiceState = "ready"
    counters: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    period_s: float = 5.0
    requests: list[InferenceRequest] = field(default_factory=list)
    cancelled: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    resume: asyncio.Event = field(default_factory=asyncio.Event)
    is_dead: bool = False
    attainable: bool = True
    _asked: asyncio.Condition = field(default_factory=asyncio.Condition)
    _subscriptions: list[Subscription] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> FakeExecutor:
        """Beat, and listen to cancels."""
        self._subscriptions.append(await self.bus.subscribe(subjects.ALL_CANCELS, Cancel, self._on_cancel))
        await self.beat()
        self._tasks.append(asyncio.create_task(self._beats()))
        return self

    async def kill(self) -> None:
        """No more chunks, and no more beats: the next was due at once, so that it is missed soon, however slow the machine."""
        if not self.is_dead and self.bus.client.is_connected:
            self.period_s = BEAT_S / 5
            await self.beat()
        self.is_dead = True
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        self._subscriptions.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def admit(self, request: InferenceRequest) -> Admitted:
        """Take a request and begin to answer it."""
        async with self._asked:
            self.requests.append(request)
            self._asked.notify_all()
        self._tasks.append(asyncio.create_task(self._generate(request)))
        return Admitted(request_id=request.request_id, executor_id=self.executor_id, attainable=self.attainable)

    async def was_asked(self, num_requests: int) -> None:
        """Wait for so many requests in all."""
        async with self._asked:
            await self._asked.wait_for(lambda: len(self.requests) >= num_requests)

    async def beat(self) -> None:
        """One heartbeat."""
        load = ExecutorLoad(
            model=self.model,
            adapters=self.adapters,
            max_model_len=self.max_model_len,
            page_size=16,
            num_pages=100,
            free_pages=75,
            num_running=2,
            num_waiting=1,
            waiting_prefill_tokens=10,
            context_tokens=20,
            promised_tpot_ms=(),
            latency=LatencyProfile(points=((1, 10.0), (64, 20.0))),
            **self.load_fields,
        )
        await self.bus.publish(subjects.beat("executor", self.executor_id), self._beat(load))

    def _beat(self, load: ExecutorLoad) -> Beat:
        return Beat(
            role="executor",
            instance_id=self.executor_id,
            state=self.state,
            sent_at=time.time(),
            period_s=self.period_s,
            counters=self.counters,
            gauges=self.gauges,
            executor=load,
        )

    async def _beats(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self.beat()

    async def _generate(self, request: InferenceRequest) -> None:
        tokens = self._tokens(request)
        finish: FinishReason = "stop" if tokens and tokens[-1] in request.stop_token_ids else "length"
        groups = [tokens[i : i + self.chunk_size] for i in range(0, len(tokens), self.chunk_size)]
        scored = request.prompt_tokens[1:] if request.prompt_logprobs is not None else ()
        prompts = [scored[i : i + 7] for i in range(0, len(scored), 7)]
        for seq, group in enumerate([*prompts, *groups]):
            if seq == self.stall_at and self.num_stalls > 0:
                self.num_stalls -= 1
                self.stalled.set()
                await self.resume.wait()
            if seq < len(prompts):
                numbers = fake_logprobs(group, request.prompt_logprobs)
                told = TokenChunk(request_id=request.request_id, seq=seq, prompt_logprobs=numbers)
                await self.bus.publish(subjects.stream(request.request_id), told)
                continue
            reason: FinishReason | None = finish if seq == len(prompts) + len(groups) - 1 else None
            reason = "error" if seq == self.fail_at else reason
            usage = self._usage(request, sum(map(len, groups[: seq - len(prompts) + 1])))
            if seq == self.skip and self.num_skips > 0:
                self.num_skips -= 1
            else:
                chunk = TokenChunk(
                    request_id=request.request_id,
                    seq=seq,
                    tokens=tuple(group),
                    logprobs=fake_logprobs(group, request.logprobs),
                    finish_reason=reason,
                    usage=usage,
                )
                await self.bus.publish(subjects.stream(request.request_id), chunk)
            if reason:
                return

    def _tokens(self, request: InferenceRequest) -> list[int]:
        """The reply from where the request stands, up to max_tokens or a stop token."""
        tokens: list[int] = []
        for place in range(request.num_generated, request.max_tokens):
            tokens.append(self.reply[place % len(self.reply)])
            if tokens[-1] in request.stop_token_ids:
                break
        return tokens

    def _usage(self, request: InferenceRequest, num_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=len(request.prompt_tokens) - request.num_generated,
            completion_tokens=request.num_generated + num_tokens,
            cached_tokens=3,
            drafted_tokens=8,
            accepted_tokens=5,
            verify_steps=4,
        )

    async def _on_cancel(self, cancel: Cancel) -> None:
        if any(request.request_id == cancel.request_id for request in self.requests):
            self.cancelled.put_nowait(cancel.request_id)


class FakeAdmission:
    """Sends each request to the first living executor; `rejection` refuses all; `hold` keeps answers back until set."""

    def __init__(self, bus: Bus, *executors: FakeExecutor) -> None:
        self.executors = list(executors)
        self.rejection: Rejected | None = None
        self.hold: asyncio.Event | None = None
        self.asked = asyncio.Event()
        self._bus = bus
        self._subscription: Subscription | None = None

    async def start(self) -> FakeAdmission:
        """Take requests."""
        self._subscription = await self._bus.subscribe(
            subjects.INFER, InferenceRequest, self._on_request, queue="admission", concurrent=True
        )
        return self

    async def stop(self) -> None:
        """Take no more."""
        if self._subscription is not None:
            await self._subscription.unsubscribe()
            self._subscription = None

    async def _on_request(self, request: InferenceRequest) -> Admitted | Rejected:
        self.asked.set()
        if self.hold is not None:
            await self.hold.wait()
        if self.rejection is not None:
            return self.rejection
        for executor in self.executors:
            if not executor.is_dead:
                return await executor.admit(request)
        return Rejected(reason="no_executor", message="nobody is there", retry_after_ms=100)
