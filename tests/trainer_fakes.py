"""A model folder without a model, and an executor that trains by hashing: equal work gives equal state, doubled work not."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common import subjects
from common.bus import Bus
from common.messages import (
    Beat,
    CheckpointWritten,
    CloseJob,
    EvaluationSlice,
    ExecutorLoad,
    JobClosed,
    JobFailed,
    JobOpened,
    LatencyProfile,
    OpenJob,
    Rejected,
    SequenceEvaluated,
    ServiceState,
    SliceAccepted,
    StepDone,
    TrainingSlice,
    WriteCheckpoint,
)

MODEL = "base"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_model_dir(folder: Path, template: str = CHATML) -> Path:
    """A byte-level tokenizer with one merge (two newlines are one token) and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "\u010a"
    words = {word: i for i, word in enumerate([*alphabet, newline * 2])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def example(answer: str, question: str = "q", **assistant: Any) -> bytes:
    """One line of a training file."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **assistant}]
    return json.dumps({"messages": messages}).encode() + b"\n"


class FakeExecutor:
    """Holds jobs by the executor's contract. A job's state is the hash of all that was trained, in order.

    `permits` steps may be done (None: any number), so that a test can stop the world at a known step.
    """

    def __init__(self, bus: Bus, name: str, permits: int | None = None) -> None:
        self.bus, self.name, self.permits = bus, name, permits
        self.leases: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        self.states: dict[str, bytes] = {}
        self.queues: dict[str, list[TrainingSlice]] = {}
        self.opened: list[OpenJob] = []
        self.closed: list[CloseJob] = []
        self.slices_seen = 0
        self.max_queued = 64
        self.num_overloaded = 0
        self.num_writes = 0
        self.fail_at: int | None = None
        self.slow_start = False
        self.max_training_tokens = 0
        self.refusal: Rejected | None = None
        self.num_refused = 0
        self.lose_steps: set[int] = set()
        self.forgets_steps = False
        self.done: dict[str, list[StepDone]] = {}
        self.repeat_steps = False
        self.lose_answers = 0
        self.evaluated: list[tuple[int, int]] = []
        self.lose_scores: set[int] = set()
        self._beats: asyncio.Task[None] | None = None
        self._subscription: Any = None
        self._order = asyncio.Lock()

    async def start(self) -> FakeExecutor:
        orders: Any = OpenJob | TrainingSlice | EvaluationSlice | WriteCheckpoint | CloseJob
        self._subscription = await self.bus.subscribe(subjects.executor_slices(self.name), orders, self._on_order)
        self._beats = asyncio.create_task(self._beat())
        await self.bus.flush()
        return self

    def num_queued(self, job_id: str) -> int:
        """Slices that wait."""
        return len(self.queues[job_id])

    async def hang(self) -> None:
        """The subscription stays, but nothing is answered and the heart stops."""
        if self._beats is not None:
            self._beats.cancel()
        await self._order.acquire()

    async def die(self) -> None:
        """Lose everything and be gone."""
        if self._beats is not None:
            self._beats.cancel()
        self.leases.clear()
        await self.bus.client.close()

    async def allow(self, steps: int | None) -> None:
        """Let so many steps happen from now on."""
        self.permits = steps
        for job_id in list(self.leases):
            await self._work(job_id)

    async def _beat(self) -> None:
        states: Iterator[ServiceState] = itertools.chain(["starting"] * self.slow_start, itertools.repeat("ready"))
        for state in states:
            load = ExecutorLoad(
                model=MODEL, adapters=(), max_model_len=4096, page_size=16, num_pages=1, free_pages=1, num_running=0,
                num_waiting=0, waiting_prefill_tokens=0, context_tokens=0, promised_tpot_ms=(),
                latency=LatencyProfile(points=((1, 1.0),)), max_training_tokens=self.max_training_tokens,
            )  # fmt: skip
            beat = Beat(
                role="executor", instance_id=self.name, state=state, sent_at=time.time(), period_s=0.2,
                gauges={"jobs": float(len(self.leases))}, executor=load,
            )  # fmt: skip
            await self.bus.publish(subjects.beat("executor", self.name), beat)
            await asyncio.sleep(0.05)

    async def _on_order(self, order: OpenJob | TrainingSlice | EvaluationSlice | WriteCheckpoint | CloseJob) -> Any:
        async with self._order:
            answer = await self._obey(order)
        if self.lose_answers and isinstance(order, TrainingSlice):
            self.lose_answers -= 1
            return None
        return answer

    async def _obey(self, order: OpenJob | TrainingSlice | EvaluationSlice | WriteCheckpoint | CloseJob) -> Any:
        held = self.leases.get(order.job_id)
        if held is not None and order.lease < held:
            return Rejected(reason="stale_lease", message=f"held under {held}")
        match order:
            case OpenJob():
                return await self._open(order)
            case CloseJob():
                self.closed.append(order)
                self.leases.pop(order.job_id, None)
                return JobClosed(job_id=order.job_id)
            case _ if held != order.lease:
                return Rejected(reason="not_found", message="not open here")
            case TrainingSlice():
                return await self._accept(order)
            case EvaluationSlice():
                return await self._evaluate(order)
            case WriteCheckpoint():
                return await self._write(order)

    async def _open(self, order: OpenJob) -> JobOpened | Rejected:
        if self.refusal is not None:
            self.num_refused += 1
            return self.refusal
        step, state = 0, b""
        if order.checkpoint is not None:
            store = await self.bus.object_store(subjects.ARTIFACTS_STORE)
            held = json.loads((await store.get(order.checkpoint + ".optimizer")).data or b"")
            step, state = held["step"], bytes.fromhex(held["state"])
        self.leases[order.job_id], self.steps[order.job_id], self.states[order.job_id] = order.lease, step, state
        self.queues[order.job_id] = []
        self.opened.append(order)
        return JobOpened(job_id=order.job_id, executor_id=self.name, step=step)

    async def _accept(self, item: TrainingSlice) -> SliceAccepted | Rejected:
        queue = self.queues[item.job_id]
        key = (item.step, item.index)
        expected = (self.steps[item.job_id], 0)
        if queue:
            last = queue[-1]
            expected = (last.step + 1, 0) if last.optimizer else (last.step, last.index + 1)
        if key > expected:
            return Rejected(reason="invalid", message=f"{key} came, {expected} is next", retry_after_ms=1)
        if key == expected:
            if len(queue) >= self.max_queued:
                self.num_overloaded += 1
                return Rejected(reason="overloaded", message="full", retry_after_ms=5)
            queue.append(item)
            self.slices_seen += 1
        self.bus.spawn(self._work(item.job_id))
        return SliceAccepted(job_id=item.job_id, step=item.step, index=item.index)

    async def _evaluate(self, item: EvaluationSlice) -> SliceAccepted:
        """Each token that counts costs as much as the number of steps that are left to step 10, and every other one is hit."""
        assert item.step == self.steps[item.job_id]
        self.evaluated.append((item.step, item.index))
        tokens = sum(weight > 0 for weight in item.weights)
        if item.index not in self.lose_scores:
            score = SequenceEvaluated(
                job_id=item.job_id, lease=item.lease, step=item.step, index=item.index, loss=float(tokens * (10 - item.step)),
                num_correct=tokens // 2, num_tokens=tokens,
            )  # fmt: skip
            await self.bus.publish(subjects.job_progress(item.job_id), score)
        self.lose_scores.discard(item.index)
        return SliceAccepted(job_id=item.job_id, step=item.step, index=item.index)

    async def _work(self, job_id: str) -> None:
        """Do the steps that are complete, permitted, and still ours."""
        queue = self.queues[job_id]
        while any(item.optimizer for item in queue) and self.permits != 0 and job_id in self.leases:
            if self.permits is not None:
                self.permits -= 1
            count = next(i for i, item in enumerate(queue) if item.optimizer) + 1
            batch = queue[:count]
            del queue[:count]
            step = self.steps[job_id]
            if step == self.fail_at:
                del self.leases[job_id]
                failed = JobFailed(job_id=job_id, lease=batch[0].lease, message=f"the loss of step {step} is nan")
                await self.bus.publish(subjects.job_progress(job_id), failed)
                return
            await self._train(job_id, step, batch)

    async def _train(self, job_id: str, step: int, batch: list[TrainingSlice]) -> None:
        assert [item.step for item in batch] == [step] * len(batch)
        self.states[job_id] = trained(self.states[job_id], batch)
        self.steps[job_id] = step + 1
        tokens = sum(weight > 0 for item in batch for weight in item.weights)
        done = StepDone(
            job_id=job_id, lease=batch[0].lease, step=step, loss=1.0 / (step + 1), grad_norm=0.5, num_correct=tokens // 2,
            num_tokens=tokens, num_sequence_tokens=sum(len(item.tokens) for item in batch), elapsed_ms=10.0,
        )  # fmt: skip
        self.done.setdefault(job_id, []).append(done)
        if step in self.lose_steps:
            return
        for _ in range(2 if self.repeat_steps else 1):
            await self.bus.publish(subjects.job_progress(job_id), done)

    async def _write(self, order: WriteCheckpoint) -> CheckpointWritten:
        self.num_writes += 1
        step, state = self.steps[order.job_id], self.states[order.job_id].hex()
        data = json.dumps({"step": step, "state": state}).encode()
        store = await self.bus.object_store(subjects.ARTIFACTS_STORE)
        await store.put(order.artifact + ".optimizer", data)
        await store.put(order.artifact, data)
        steps = () if self.forgets_steps else tuple(self.done.get(order.job_id, ()))
        return CheckpointWritten(job_id=order.job_id, artifact=order.artifact, step=step, num_bytes=len(data), steps=steps)


def trained(state: bytes, batch: list[TrainingSlice]) -> bytes:
    """The state after one step."""
    for item in batch:
        text = repr((item.step, item.index, item.tokens, item.weights, item.optimizer))
        state = hashlib.sha256(state + text.encode()).digest()
    return state
