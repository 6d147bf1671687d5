"""The set-ups that serve and train at once: Heddle by policy, two Heddles, vLLM beside peft. Knows no rate and no row.

All but the one without finetuning train the same sequences in the same order: a job of Heddle's trainer, whose schedule of
batches peft's side is given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from benchmarks.coserving_rows import OURS, SEPARATE, UNTRAINED, Iteration, Piece, iterations, pieces
from benchmarks.finetune_sides import ALPHA, RANK
from benchmarks.servers import START_S, Vllm, stack
from benchmarks.streams import MODEL
from common.chat import ChatTokenizer
from services.trainer.dataset import read_dataset
from services.trainer.schedule import StepPlan
from tests.stack import Stack, eventually

BATCH_SIZE, SEED, LEARNING_RATE = 4, 1, 1e-3
N_EPOCHS = 50
MIN_ROWS, NUM_STEPS = 400, 800
"""The problems are repeated up to so many rows, and peft's side is given so many steps: no job ends while it is measured."""
MAX_LENGTH = 1024
TRAIN_S = 900.0
"""The first steps take at most so long."""
POLICIES = {OURS: "token", "temporal 64": "temporal:64", "temporal 128": "temporal:128", "temporal 512": "temporal:512"} | {
    "dynamic temporal": "dynamic"
}
SPATIAL = "spatial"
SIDES = (SEPARATE, *POLICIES, SPATIAL, UNTRAINED)


class Job(NamedTuple):
    """What is trained: as a file for Heddle, and the steps that its trainer makes of it."""

    data: bytes
    steps: list[list[dict[str, list[int]]]]


class Running(NamedTuple):
    """A set-up at work."""

    url: str
    """Where it serves."""
    iterations: Callable[[], list[Iteration]]
    """Those of the executor that serves, so far; none where it is not Heddle."""
    work: Callable[[], list[Piece]]
    """What was trained so far."""
    losses: Callable[[], list[float]]
    """Of the steps so far."""

    def first_losses(self, number: int) -> list[float]:
        """Waits for that many steps."""
        return eventually(lambda: found[:number] if len(found := self.losses()) >= number else [], TRAIN_S)


class Setup(NamedTuple):
    """With what the set-ups are made."""

    folder: Path
    dtype: str
    peer_dtype: str
    peer: Path | None
    speculation: str
    job: Job

    def sides(self) -> list[str]:
        """Those that can be started."""
        return [side for side in SIDES if side != SEPARATE or self.peer is not None]

    @contextmanager
    def running(self, side: str) -> Iterator[Running]:
        """The set-up of this name, in training unless it is UNTRAINED."""
        with ExitStack() as started:
            if side == SEPARATE:
                yield started.enter_context(self._separate())
                return
            server = self._heddle(started, {"HEDDLE_EXECUTOR_FINETUNE_SHARING": POLICIES.get(side, "token")})
            if side == UNTRAINED:
                yield Running(server.url, lambda: read_iterations(server), list, list)
                return
            trainer = server if side in POLICIES else self._heddle(started, {})
            job_id = create_job(trainer, self.job.data)
            yield Running(
                server.url,
                lambda: read_iterations(server),
                lambda: pieces(read_iterations(trainer)),
                lambda: losses_of(trainer, job_id),
            )

    @contextmanager
    def reference(self) -> Iterator[Running]:
        """peft on all cores, without a server."""
        with HfTrainer(self.folder, self.peer_dtype, self.job, sorted(os.sched_getaffinity(0))) as trainer:
            yield Running("", list, trainer.work, trainer.losses)

    @contextmanager
    def _separate(self) -> Iterator[Running]:
        assert self.peer is not None
        serving, training = halves(sorted(os.sched_getaffinity(0)))
        with HfTrainer(self.folder, self.peer_dtype, self.job, training) as trainer:
            server = Vllm(self.peer, self.folder, trainer.home / "vllm.log", self.peer_dtype, cores=serving).start(START_S)
            try:
                yield Running(server.url, list, trainer.work, trainer.losses)
            finally:
                server.stop()

    def _heddle(self, started: ExitStack, settings: dict[str, str]) -> Stack:
        options = ("--dtype", self.dtype, "--speculation", self.speculation, "--no-prefix-cache")
        return started.enter_context(stack(self.folder, *options, settings=settings))


class HfTrainer:
    """peft and transformers' Trainer in a process of its own, on these cores."""

    def __init__(self, folder: Path, dtype: str, job: Job, cores: Sequence[int]) -> None:
        self._folder, self._dtype, self._job, self._cores = folder, dtype, job, cores
        self._lines: list[dict[str, float]] = []
        self._started = ExitStack()

    def __enter__(self) -> HfTrainer:
        self.home = Path(self._started.enter_context(tempfile.TemporaryDirectory()))
        batches = self.home / "batches.json"
        batches.write_text(json.dumps({"learning_rate": LEARNING_RATE, "steps": self._job.steps}))
        arguments = [str(self._folder), self._dtype, str(len(self._cores)), str(batches)]
        self._errors = self.home / "trainer.log"
        with self._errors.open("wb") as sink:
            command = [sys.executable, "-m", "benchmarks.hf_trainer", *arguments]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, text=True)
        os.sched_setaffinity(self._process.pid, self._cores)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._started.close()

    def work(self) -> list[Piece]:
        """The steps so far."""
        self._check()
        return [Piece(line["started_at"], line["ended_at"], line["tokens"]) for line in list(self._lines)]

    def losses(self) -> list[float]:
        """Of the steps so far."""
        self._check()
        return [line["loss"] for line in list(self._lines)]

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise SystemExit(f"peft's side ended with {self._process.returncode}:\n{self._errors.read_text()[-4000:]}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if text.startswith('{"step"'):
                self._lines.append(json.loads(text))


def halves(cores: Sequence[int]) -> tuple[list[int], list[int]]:
    """Those to serve on and those to train on; one core has to do for both."""
    middle = max(1, len(cores) // 2)
    return list(cores[:middle]), list(cores[middle:] or cores)


def make_job(problems: Sequence[dict[str, str]], folder: Path) -> Job:
    """Problems as chats with their solutions, in whole batches."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Complete this Python function:\n" + problem["prompt"]},
                {"role": "assistant", "content": problem["canonical_solution"]},
            ]
        }
        for problem in problems
    ]
    rows *= -(-MIN_ROWS // len(rows))
    rows = rows[: len(rows) // BATCH_SIZE * BATCH_SIZE]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    sequences = read_dataset(data, ChatTokenizer.load(folder), MAX_LENGTH).sequences
    plan = StepPlan(num_sequences=len(rows), batch_size=BATCH_SIZE, n_epochs=N_EPOCHS, seed=SEED)
    steps = [[sequences[i] for i in plan.batch(step)] for step in range(NUM_STEPS)]
    return Job(data, [[{"tokens": list(s.tokens), "in_loss": list(map(int, s.in_loss))} for s in step] for step in steps])


def create_job(running: Stack, data: bytes) -> str:
    """Upload the file and start training on it; returns the job's id."""
    api = f"{running.url}/v1"
    sent = httpx.post(f"{api}/files", files={"file": ("train.jsonl", data)}, data={"purpose": "fine-tune"}, timeout=60)
    body = {
        "model": MODEL,
        "training_file": sent.raise_for_status().json()["id"],
        "seed": SEED,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": N_EPOCHS, "batch_size": BATCH_SIZE}}},
        "lora": {"rank": RANK, "alpha": ALPHA, "learning_rate": LEARNING_RATE, "scheduler": "constant"},
    }
    job_id: str = httpx.post(f"{api}/fine_tuning/jobs", json=body, timeout=60).raise_for_status().json()["id"]
    return job_id


def losses_of(running: Stack, job_id: str) -> list[float]:
    """A job's losses by step, as long as there are few; ends the program when the job did."""
    api = f"{running.url}/v1/fine_tuning/jobs/{job_id}"
    job = httpx.get(api, timeout=60).raise_for_status().json()
    if job["status"] not in ("validating_files", "queued", "running"):
        raise SystemExit(f"the job ended as {job['status']}: {job['error']}")
    events = httpx.get(f"{api}/events", params={"limit": 100}, timeout=60).raise_for_status().json()["data"]
    return [float(event["data"]["train_loss"]) for event in reversed(events) if event["type"] == "metrics"]


def read_iterations(running: Stack) -> list[Iteration]:
    """What a stack's executor has logged."""
    with (running.state_dir / "logs" / "executor-1.log").open() as log:
        return iterations(log)
