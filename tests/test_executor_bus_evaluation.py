"""Sequences that a trainer has scored by an executor over a real bus."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common import subjects
from common.artifacts import read_object
from common.messages import (
    CheckpointWritten,
    EvaluationSlice,
    JobOpened,
    LoraSpec,
    OptimizerStep,
    Rejected,
    SequenceEvaluated,
    SliceAccepted,
    StepDone,
    TrainingSlice,
    WriteCheckpoint,
)
from services.executor.batch import Segment, build_batch
from services.executor.lora import LoraAdapter
from services.executor.model import KvCache
from tests.executor_stage import TIMEOUT_S, Connect, Stage, known_profile, open_job, running_executor, write_model
from tests.tiny import random_prompt

SPEC = LoraSpec(rank=2, alpha=4.0, dropout=0.5)
TOKENS = random_prompt(40, 5)
CPU = torch.device("cpu")


@pytest.fixture
async def stage(connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    known_profile(monkeypatch)
    async with running_executor(connect, write_model(tmp_path)) as stage:
        yield stage


def evaluation(step: int, index: int, num_tokens: int) -> EvaluationSlice:
    weights = (0.0, *[1.0] * (num_tokens - 1))
    tokens = tuple(TOKENS[:num_tokens])
    return EvaluationSlice(job_id="job", lease=1, step=step, index=index, tokens=tokens, weights=weights)


async def train(stage: Stage, step: int) -> None:
    """A step of one sequence, to its end."""
    weights = (0.0, *[1.0 / 39] * 39)
    optimizer = OptimizerStep(learning_rate=0.1)
    tokens = tuple(random_prompt(40, step))
    item = TrainingSlice(job_id="job", lease=1, step=step, index=0, tokens=tokens, weights=weights, optimizer=optimizer)
    assert isinstance(await stage.order(item), SliceAccepted)
    await stage.progress.first(lambda event: isinstance(event, StepDone) and event.step == step)


async def artifact(stage: Stage, name: str) -> tuple[bytes, bytes]:
    """Adapter and state of a checkpoint that is written now."""
    assert isinstance(await stage.order(WriteCheckpoint(job_id="job", lease=1, artifact=name)), CheckpointWritten)
    store = await stage.client.object_store(subjects.ARTIFACTS_STORE)
    return await read_object(store, name, TIMEOUT_S), await read_object(store, f"{name}.optimizer", TIMEOUT_S)


async def test_an_evaluation_is_the_loss_without_dropout_and_changes_nothing(stage: Stage) -> None:
    assert isinstance(await stage.order(open_job(lora=SPEC, seed=1)), JobOpened)
    for step in range(2):
        await train(stage, step)
    refused = await stage.order(evaluation(1, 0, 40))
    assert isinstance(refused, Rejected)
    assert "step 2 is next" in refused.message

    before = await artifact(stage, "before")
    for index, num_tokens in enumerate((40, 1, 17)):
        assert await stage.order(evaluation(2, index, num_tokens)) == SliceAccepted(job_id="job", step=2, index=index)
    scores = [score for score in await stage.progress.hold(5) if isinstance(score, SequenceEvaluated)]
    assert sorted((score.index, score.num_tokens) for score in scores) == [(0, 39), (1, 0), (2, 16)]
    assert await artifact(stage, "after") == before

    decoder = stage.engine.decoder
    adapter = LoraAdapter.from_safetensors("after", SPEC, before[0], decoder.config)
    segment = Segment(tokens=TOKENS, positions=range(40), context_slots=(), slots=range(40), adapter=adapter)
    cache = KvCache(decoder.config, 64, torch.float32, CPU)
    logits = decoder.logits(decoder.forward(build_batch([segment], CPU), cache))
    for score in scores:
        rows, labels = logits[: score.num_tokens], torch.tensor(TOKENS[1 : score.num_tokens + 1], dtype=torch.int64)
        assert score.loss == pytest.approx(float(F.cross_entropy(rows, labels, reduction="sum")), rel=1e-5)
        assert score.num_correct == int((rows.argmax(-1) == labels).sum())
    await stage.settled()
    assert stage.load.free_pages == stage.load.num_pages
