"""Jobs: optimizer steps against PEFT training, checkpoints, order of slices, divergence."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from common.messages import LoraSpec, OptimizerStep, TrainingSlice
from services.executor.adapter_spec import InvalidAdapterError
from services.executor.finetune import FinetuneJob, new_job
from services.executor.job_steps import OutOfOrderSliceError, TrainingDivergedError
from services.executor.model import Decoder, KvCache
from services.executor.training_sequence import InvalidSliceError
from tests.helpers import (
    PEFT_WARNING,
    as_decoder,
    assert_close_in_norm,
    new_cache,
    random_tokens,
    tiny_model,
    train_queued,
    training_slice,
)

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)

SPEC = LoraSpec(rank=3, alpha=6.0)
ADAMW = OptimizerStep(learning_rate=0.02, beta2=0.95, weight_decay=0.1, max_grad_norm=0.5)


@dataclasses.dataclass
class Setup:
    model: Any
    decoder: Decoder
    cache: KvCache

    def job(self, spec: LoraSpec = SPEC, seed: int = 0) -> FinetuneJob:
        return new_job("job", spec, seed, self.decoder, self.cache)

    def steps(self, first: int, last: int) -> list[TrainingSlice]:
        """Steps [first, last) of two slices each; the tokens depend on the step alone."""
        return [
            training_slice(
                random_tokens(self.decoder, 9 + 4 * index, seed=10 * step + index),
                [0.0] + [0.05] * (8 + 4 * index),
                step=step,
                index=index,
                optimizer=ADAMW if index else None,
            )
            for step in range(first, last)
            for index in range(2)
        ]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    model = tiny_model()
    decoder = as_decoder(model, tmp_path)
    return Setup(model, decoder, new_cache(decoder))


def accept_all(job: FinetuneJob, items: list[TrainingSlice]) -> None:
    for item in items:
        assert job.accept(item)


def peft_training(
    model: Any, start: dict[str, Tensor], items: list[TrainingSlice]
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(loss, gradient norm) of every step and the trained matrices, by PEFT, torch.optim.AdamW and clip_grad_norm_."""
    config = peft.LoraConfig(
        r=SPEC.rank, lora_alpha=int(SPEC.alpha), target_modules=list(SPEC.target_modules), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    peft.set_peft_model_state_dict(model, start)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    results, loss = [], torch.zeros(())
    for item in items:
        logits = model(input_ids=torch.tensor([item.tokens])).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.tensor(item.tokens[1:]), reduction="none")
        loss = loss + (losses * torch.tensor(item.weights[1:])).sum()
        if item.optimizer is not None:
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            results.append((float(loss.detach()), float(norm)))
            loss = torch.zeros(())
    return results, peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize(("forward", "backward"), [((1000,), 1000), ((5, 1, 3), 2)])
def test_five_steps_equal_peft_training(setup: Setup, forward: tuple[int, ...], backward: int) -> None:
    job, items = setup.job(), setup.steps(0, 5)
    start = {name: tensor.clone() for name, tensor in job.adapter.weights.tensors.items()}
    accept_all(job, items)
    results = train_queued(job, setup.decoder, setup.cache, forward=forward, backward=backward)
    expected, trained = peft_training(setup.model, start, items)
    assert [result.step for result in results] == list(range(5))
    for result, (loss, norm) in zip(results, expected, strict=True):
        assert result.loss == pytest.approx(loss, rel=1e-4)
        assert result.grad_norm == pytest.approx(norm, rel=1e-3)
    assert max(norm for _, norm in expected) > 0.5, "some step must be clipped"
    for name, tensor in job.adapter.weights.tensors.items():
        assert_close_in_norm(tensor - start[name], trained[name] - start[name], 1e-2)
    assert job.step == 5
    assert job.start_next() == ()


def test_a_new_job_changes_nothing_at_first_and_its_start_depends_on_the_seed(setup: Setup) -> None:
    one, same, other = setup.job(seed=1), setup.job(seed=1), setup.job(seed=2)
    for linears in one.adapter.weights.linears.values():
        for linear in linears:
            assert not linear.b_OR.any()
            bound = 1 / math.sqrt(linear.a_RI.shape[1])
            assert bound / 2 < linear.a_RI.abs().max() <= bound
    assert torch.equal(one.adapter.weights.flat, same.adapter.weights.flat)
    assert not torch.equal(one.adapter.weights.flat, other.adapter.weights.flat)


def test_the_loss_falls_on_a_repeated_sequence(setup: Setup) -> None:
    job = setup.job()
    tokens = random_tokens(setup.decoder, 16)
    accept_all(job, [training_slice(tokens, step=step, optimizer=ADAMW) for step in range(25)])
    results = train_queued(job, setup.decoder, setup.cache)
    assert results[-1].loss < 0.5 * results[0].loss
    assert results[-1].num_correct > results[0].num_correct


def test_counts_of_a_step(setup: Setup) -> None:
    job = setup.job()
    tokens = random_tokens(setup.decoder, 8)
    accept_all(
        job,
        [
            training_slice(tokens, [0, 0, 0, 0.5, 0.5, 0, 0, 0]),
            training_slice(tokens, [0] * 8, index=1),
            training_slice(tokens[:4], [9, 1, 1, 1], index=2, optimizer=ADAMW),
        ],
    )
    (result,) = train_queued(job, setup.decoder, setup.cache)
    assert (result.num_tokens, result.num_sequence_tokens) == (2 + 0 + 3, 8 + 8 + 4)
    assert 0 <= result.num_correct <= 5


def test_a_restored_job_goes_on_to_the_bit(setup: Setup) -> None:
    whole = setup.job()
    accept_all(whole, setup.steps(0, 4))
    expected = train_queued(whole, setup.decoder, setup.cache)
    first = setup.job()
    accept_all(first, setup.steps(0, 2))
    done = train_queued(first, setup.decoder, setup.cache)
    # a checkpoint in the middle of step 2 holds the state before it
    accept_all(first, setup.steps(2, 3)[:1])
    train_queued(first, setup.decoder, setup.cache)
    data = first.checkpoint()
    resumed = setup.job(seed=99)
    resumed.restore(data)
    assert resumed.step == 2
    assert not resumed.accept(setup.steps(1, 2)[1])
    accept_all(resumed, setup.steps(2, 4))
    assert done + train_queued(resumed, setup.decoder, setup.cache) == expected
    assert resumed.checkpoint() == whole.checkpoint()


def test_a_checkpoint_of_another_shape_or_no_checkpoint_is_refused(setup: Setup) -> None:
    job = setup.job()
    with pytest.raises(InvalidAdapterError, match=r"checkpoint of job job: .* has shape"):
        job.restore(setup.job(LoraSpec(rank=4)).checkpoint())
    with pytest.raises(InvalidAdapterError, match="lacks"):
        job.restore(setup.job(LoraSpec(rank=3, target_modules=("q_proj",))).checkpoint())
    with pytest.raises(InvalidAdapterError, match="has no step"):
        job.restore(job.adapter.to_safetensors())
    with pytest.raises(InvalidAdapterError, match="not in safetensors format"):
        job.restore(b"nonsense")
    with pytest.raises(InvalidAdapterError, match="step is -1"):
        job.restore(safetensors.torch.save(safetensors.torch.load(job.checkpoint()) | {"step": torch.tensor(-1)}))
    assert job.step == 0


def test_slices_come_once_and_in_order(setup: Setup) -> None:
    job, items = setup.job(), setup.steps(0, 2)
    assert job.accept(items[0])
    assert not job.accept(items[0])
    with pytest.raises(OutOfOrderSliceError, match=r"\(1, 0\) came, \(0, 1\) is next"):
        job.accept(items[2])
    assert job.accept(items[1])
    assert not job.accept(items[1])
    assert job.accept(items[2])
    assert len(train_queued(job, setup.decoder, setup.cache)) == 1
    assert not job.accept(items[0])


@pytest.mark.parametrize(
    ("tokens", "weights", "message"),
    [
        ([1, 2], [0.0], "weights: 1 for 2 tokens"),
        ([], [], "tokens: empty"),
        ([1, 61], [0.0, 1.0], "tokens: ids must be in"),
        ([-1, 2], [0.0, 1.0], "tokens: ids must be in"),
        ([1, 2], [0.0, math.nan], "weights: not finite"),
        ([1] * 129, [0.0] * 129, "tokens: 129, the model takes 128"),
    ],
)
def test_impossible_slices_are_refused_and_can_be_sent_again(
    setup: Setup, tokens: list[int], weights: list[float], message: str
) -> None:
    job = setup.job()
    with pytest.raises(InvalidSliceError, match=message):
        job.accept(training_slice(tokens, weights))
    assert job.start_next() == ()
    assert job.accept(training_slice([1, 2, 3]))


def test_a_loss_that_is_not_finite_ends_the_job_and_spares_the_adapter(setup: Setup) -> None:
    job = setup.job()
    setup.decoder.final_norm_H[0] = math.inf
    before = job.adapter.weights.flat.clone()
    accept_all(job, setup.steps(0, 1))
    with pytest.raises(TrainingDivergedError, match="job job: the loss of step 0 is nan"):
        train_queued(job, setup.decoder, setup.cache)
    assert torch.equal(job.adapter.weights.flat, before)


def test_a_gradient_that_is_not_finite_ends_the_job_and_spares_the_adapter(setup: Setup) -> None:
    job = setup.job()
    before = job.adapter.weights.flat.clone()
    accept_all(job, [training_slice(random_tokens(setup.decoder, 8), [0.0] + [1e30] * 7, optimizer=ADAMW)])
    with pytest.raises(TrainingDivergedError, match="the gradient norm of step 0 is inf"):
        train_queued(job, setup.decoder, setup.cache)
    assert torch.equal(job.adapter.weights.flat, before)


def test_backward_needs_a_forwarded_sequence(setup: Setup) -> None:
    job = setup.job()
    with pytest.raises(ValueError, match="no forwarded sequence"):
        job.cursors()
    accept_all(job, setup.steps(0, 1)[:1])
    job.start_next()
    with pytest.raises(ValueError, match="no forwarded sequence"):
        job.cursors()


def test_two_jobs_share_a_cache_and_do_not_touch_each_other(setup: Setup) -> None:
    def trained(job: FinetuneJob, items: list[TrainingSlice]) -> bytes:
        accept_all(job, items)
        train_queued(job, setup.decoder, setup.cache)
        return job.checkpoint()

    alone = trained(setup.job(), setup.steps(0, 2))
    one, two = setup.job(), setup.job(LoraSpec(rank=1, target_modules=("v_proj", "down_proj")), seed=3)
    for step in range(2):
        data = trained(one, setup.steps(step, step + 1))
        trained(two, setup.steps(step, step + 1))
    assert data == alone
