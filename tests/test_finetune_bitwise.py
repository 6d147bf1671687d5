"""With compiled operations a finetuned adapter is the same bit for bit, however time cuts and gathers its work."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import pytest
import torch

from common.messages import EvaluationSlice, LoraSpec, OptimizerStep, Sampling, TrainingSlice
from kernels.native.build import library
from services.executor.finetune import new_job
from services.executor.model import Decoder
from services.executor.views import Limits
from tests.helpers import training_slice
from tests.test_executor_bitwise import WIDE, decoder_of
from tests.tiny import Driver, random_prompt, tiny_engine, tiny_request

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler, or no AVX2")

NUM_STEPS = 3
decoder = functools.cache(decoder_of)
LENGTHS = (23, 60, 7, 41)
ADAMW = OptimizerStep(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)
SGD = OptimizerStep(learning_rate=1e-2, method="sgd", momentum=0.9)
JOBS: dict[str, tuple[LoraSpec, OptimizerStep]] = {
    "all": (LoraSpec(rank=4, alpha=8.0, dropout=0.2), ADAMW),
    "some": (LoraSpec(rank=3, use_rslora=True, target_modules=("q_proj", "v_proj", "o_proj")), SGD),
    "ia3": (
        LoraSpec(
            method="ia3", target_modules=("k_proj", "o_proj", "down_proj"), feedforward_modules=("down_proj",)
        ),
        ADAMW,
    ),
    "bottleneck": (
        LoraSpec(method="bottleneck", rank=5, non_linearity="gelu", target_modules=("o_proj", "down_proj"), dropout=0.1), ADAMW
    ),
    "pfeiffer": (LoraSpec(method="bottleneck", rank=3, non_linearity="relu", target_modules=("down_proj",)), SGD),
}  # fmt: skip


def slices(job_id: str) -> list[TrainingSlice]:
    """Steps of four sequences each; the first rows of some have no loss."""
    made = []
    for step in range(NUM_STEPS):
        for index, length in enumerate(LENGTHS):
            tokens = random_prompt(length + step, seed=10 * step + index)
            weights = [0.0 if i <= 3 * index else 1 / 200 for i in range(len(tokens))]
            optimizer = JOBS[job_id][1] if index == len(LENGTHS) - 1 else None
            item = training_slice(tokens, weights, step=step, index=index, optimizer=optimizer)
            fields = {name: getattr(item, name) for name in item.__struct_fields__} | {"job_id": job_id}
            made.append(TrainingSlice(**fields))
    return made


class Run:
    """All jobs to their end. With a source of chance: at any pace, beside requests, in engines that die."""

    def __init__(self, decoder: Decoder, draw: random.Random | None, job_ids: tuple[str, ...]) -> None:
        self._decoder, self._draw, self._job_ids = decoder, draw, job_ids
        self._requests = 0
        self._checkpoints: dict[str, bytes] = {}
        self.results: dict[str, dict[int, Any]] = {job_id: {} for job_id in job_ids}
        self.num_restarts = self.num_iterations = 0
        while not self._is_life_over():
            self.num_restarts += 1

    def _is_life_over(self) -> bool:
        """One engine's life: until all is done, or until it dies."""
        draw = self._draw
        engine = tiny_engine(self._decoder, num_pages=draw.choice([80, 128, 256]) if draw else 512)
        left = {job_id: slices(job_id) for job_id in self._job_ids}
        for job_id, (spec, _) in JOBS.items():
            if job_id in self._job_ids:
                job = new_job(job_id, spec, 7, self._decoder, engine.cache)
                if job_id in self._checkpoints:
                    job.restore(self._checkpoints[job_id])
                engine.training.open(job, lease=1)
                left[job_id] = [item for item in left[job_id] if item.step >= job.step]
        driver, dies_after = Driver(engine), draw.randint(10, 25) if draw and self.num_restarts < 2 else 10**6
        for _ in range(dies_after):
            self.num_iterations += 1
            for items in left.values():
                while items and (draw is None or draw.random() < 0.5):
                    engine.training.accept(items.pop(0))
            if draw is not None:
                self._vary(draw, engine)
            driver.step()
            for event in driver.events:
                assert not event.failure
                if event.step is not None:
                    self.results[event.job_id].setdefault(event.step.step, []).append(dataclasses.astuple(event.step))
            driver.events.clear()
            if not engine.has_work and not any(left.values()):
                break
            if draw is not None and draw.random() < 0.1:
                self._save(engine)
        else:
            return False
        self._save(engine)
        self.scores = self._evaluated(engine, driver)
        return True

    def _vary(self, draw: random.Random, engine: Any) -> None:
        idle_ms, busy_ms = draw.choice([6.0, 8.0, 30.0]), draw.choice([6.0, 9.0, 40.0])
        engine.limits = Limits(
            idle_iteration_ms=idle_ms,
            interruptible_ms=draw.choice([0.0, 60.0]),
            max_iteration_ms=busy_ms,
            min_prefill_tokens=4,
        )
        engine.has_news = lambda: draw.random() < 0.3
        if draw.random() < 0.3 and len(engine.sequences) < 4:
            self._requests += 1
            prompt = random_prompt(draw.randint(1, 40), seed=self._requests)
            assert engine.submit(tiny_request(f"r{self._requests}", prompt, 5, sampling=Sampling(seed=1)), None) is None

    def _save(self, engine: Any) -> None:
        for job_id in self._job_ids:
            self._checkpoints[job_id] = engine.training.held(job_id, 1).checkpoint()

    def _evaluated(self, engine: Any, driver: Driver) -> dict[str, float]:
        for job_id in self._job_ids:
            tokens = random_prompt(50, seed=99)
            weights = (0.0,) + (1.0,) * 49
            item = EvaluationSlice(job_id=job_id, lease=1, step=NUM_STEPS, index=0, tokens=tokens, weights=weights)
            engine.training.accept(item)
        driver.run()
        return {event.job_id: event.score.loss for event in driver.events if event.score is not None}

    @property
    def outcome(self) -> dict[str, Any]:
        """Of each job its steps (all of them, the same each time they were done), its last checkpoint, its validation loss."""
        for steps in self.results.values():
            assert sorted(steps) == list(range(NUM_STEPS))
            assert all(len(set(found)) == 1 for found in steps.values())
        first = {job_id: [steps[step][0] for step in range(NUM_STEPS)] for job_id, steps in self.results.items()}
        return {job_id: (first[job_id], self._checkpoints[job_id], self.scores[job_id]) for job_id in self._job_ids}


@functools.cache
def undisturbed(dtype: torch.dtype, job_id: str) -> Any:
    """The job alone in one engine, each step in as few pieces as can be."""
    return Run(decoder(dtype), None, (job_id,)).outcome[job_id]


@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 0)], ids=str)
def test_pace_load_and_restarts_change_no_bit(dtype: torch.dtype, seed: int) -> None:
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is torch's here")
    run = Run(decoder(dtype), random.Random(seed), tuple(JOBS))
    assert run.num_restarts > 0
    for job_id, outcome in run.outcome.items():
        assert outcome[0] == undisturbed(dtype, job_id)[0]
        assert outcome[1:] == undisturbed(dtype, job_id)[1:]


def test_the_model_is_one_that_the_compiled_operations_take() -> None:
    model = decoder(torch.float32)
    assert model.stack is not None
    assert model.config.hidden_size == WIDE["hidden_size"]
