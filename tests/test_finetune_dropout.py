"""Dropout, rsLoRA and SGD in training: against PEFT's autograd with the same masks, in any split into windows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.messages import LoraSpec, OptimizerStep, TrainingSlice
from kernels import ops
from services.executor.adapter_spec import MODULES
from services.executor.dropout import RowDropout
from services.executor.finetune import FinetuneJob, new_job
from services.executor.model import Decoder
from tests.helpers import (
    CPU,
    PEFT_WARNING,
    as_decoder,
    assert_close_in_norm,
    new_cache,
    random_tokens,
    tiny_model,
    train_queued,
    training_slice,
)

RATE, SEED, NUM_STEPS, NUM_SLICES = 0.3, 7, 3, 2
SPEC = LoraSpec(rank=4, alpha=6.0, use_rslora=True, dropout=RATE)
SGD = OptimizerStep(learning_rate=0.5, method="sgd", momentum=0.9, weight_decay=0.1, max_grad_norm=0.5)


def all_slices(decoder: Decoder) -> list[TrainingSlice]:
    return [
        training_slice(
            random_tokens(decoder, 9 + 8 * index, seed=10 * step + index),
            [0.0] + [0.05] * (8 + 8 * index),
            step=step,
            index=index,
            optimizer=SGD if index == NUM_SLICES - 1 else None,
        )
        for step in range(NUM_STEPS)
        for index in range(NUM_SLICES)
    ]


class OurMask(torch.nn.Module):
    """PEFT's dropout of one linear, with the mask that we drop by."""

    current: RowDropout

    def __init__(self, layer: int, module: str) -> None:
        super().__init__()
        self._layer, self._module = layer, module

    def forward(self, x_1TI: Tensor) -> Tensor:
        kept_TI = self.current.drop(self._layer, self._module, torch.ones_like(x_1TI[0]))
        return x_1TI * kept_TI / (1.0 - RATE)


def peft_training(model: Any, start: dict[str, Tensor], items: list[TrainingSlice]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps and the trained matrices, by PEFT and torch.optim.SGD."""
    config = peft.LoraConfig(
        r=SPEC.rank, lora_alpha=int(SPEC.alpha), lora_dropout=RATE, use_rslora=True,
        target_modules=list(SPEC.target_modules), task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(model, config).train()
    peft.set_peft_model_state_dict(model, start)
    for layer, block in enumerate(model.base_model.model.model.layers):
        for module, (name, targets) in MODULES.items():
            for target in targets:
                getattr(getattr(block, name), target).lora_dropout["default"] = OurMask(layer, module)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=0.1)
    losses, loss = [], torch.zeros(())
    for item in items:
        num_rows = len(item.tokens)
        mask = RowDropout.of_sequence(RATE, seed=SEED, step=item.step, index=item.index, num_rows=num_rows, device=CPU)
        assert mask is not None
        OurMask.current = mask
        logits = model(input_ids=torch.tensor([item.tokens])).logits[0, :-1]
        token_losses = F.cross_entropy(logits, torch.tensor(item.tokens[1:]), reduction="none")
        loss = loss + (token_losses * torch.tensor(item.weights[1:])).sum()
        if item.optimizer is not None:
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            loss = torch.zeros(())
    return losses, peft.get_peft_model_state_dict(model)


def trained(
    decoder: Decoder, items: list[TrainingSlice], max_recompute_share: float = 0.0, **windows: Any
) -> tuple[list[float], FinetuneJob]:
    cache = new_cache(decoder)
    job = new_job("job", SPEC, SEED, decoder, cache, max_recompute_share)
    assert all(job.accept(item) for item in items)
    return [result.loss for result in train_queued(job, decoder, cache, **windows)], job


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("windows", [{"max_recompute_share": 1.0}, {"forward": (5, 1, 3), "backward": 2}])
def test_steps_with_dropout_equal_peft_with_the_same_masks(windows: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model()
    decoder = as_decoder(model, tmp_path)
    items = all_slices(decoder)
    untrained = new_job("job", SPEC, SEED, decoder, new_cache(decoder))
    start = {name: tensor.clone() for name, tensor in untrained.adapter.weights.tensors.items()}
    losses, job = trained(decoder, items, **windows)
    expected, matrices = peft_training(model, start, items)
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, tensor in job.adapter.weights.tensors.items():
        assert_close_in_norm(tensor, matrices[name], 1e-3)


def test_rows_that_are_dropped_depend_on_their_place_alone() -> None:
    def mask(**changes: Any) -> Tensor:
        place: dict[str, Any] = {"seed": 1, "step": 2, "index": 0, "layer": 1, "module": "qkv"} | changes
        layer, module = place.pop("layer"), place.pop("module")
        rows = RowDropout.of_sequence(0.5, num_rows=8, device=CPU, **place)
        assert rows is not None
        return rows.drop(layer, module, torch.ones(8, 32))

    assert torch.equal(mask(), mask())
    others: list[dict[str, Any]] = [{"seed": 2}, {"step": 3}, {"index": 1}, {"layer": 2}, {"module": "down"}]
    masks = [mask(), *(mask(**change) for change in others)]
    assert len({tuple(m.flatten().tolist()) for m in masks}) == len(masks)
    assert len({tuple(row.tolist()) for row in mask()}) == 8


def test_rates_are_kept_and_elements_are_independent() -> None:
    num_rows, num_columns = 400, 96
    keys_T = ops.drop_keys(12345, torch.arange(num_rows))
    for rate in (0.0, 0.05, 0.5, 0.9):
        rates_T = torch.full((num_rows,), rate, dtype=torch.float64)
        dropped = (ops.drop(torch.ones(num_rows, num_columns), keys_T, rates_T, 3) == 0).double()
        sigma = math.sqrt(rate * (1 - rate) / dropped.numel())
        assert abs(dropped.mean() - rate) <= 4 * sigma
        for a, b in ((dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1])):
            assert abs(((a - rate) * (b - rate)).mean()) <= 4 * rate * (1 - rate) / math.sqrt(a.numel())


def test_masks_are_what_unsigned_arithmetic_gives() -> None:
    def hashed(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    def is_kept(sequence_key: int, position: int, salt: int, column: int) -> bool:
        key = hashed((position * 0x9E3779B9 + sequence_key) % 2**32)
        place = hashed((key + salt * 0x9E3779B9) % 2**32) + column * 0x85EBCA6B
        return hashed(place % 2**32) >> 8 >= 0.25 * 2**24

    for sequence_key, salt in ((1, 5), (2**32 - 1, 119)):
        keys_T = ops.drop_keys(sequence_key, torch.arange(40))
        kept = ops.drop(torch.ones(40, 50), keys_T, torch.full((40,), 0.25, dtype=torch.float64), salt)
        assert kept.bool().tolist() == [[is_kept(sequence_key, t, salt, i) for i in range(50)] for t in range(40)]
