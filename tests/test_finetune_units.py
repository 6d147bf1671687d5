"""Fused backward units: several jobs and sequences, out of step with each other, against Hugging Face PEFT each."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from common.messages import LoraSpec
from services.executor.backward import advance, next_unit
from services.executor.backward_cursor import BackwardCursor
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder, KvCache
from tests.helpers import (
    PEFT_WARNING,
    as_decoder,
    assert_close_in_norm,
    forward_sequence,
    new_cache,
    random_adapter,
    random_tokens,
    tiny_model,
    training_sequence,
    training_slice,
)
from tests.test_finetune_gradients import FP64, peft_gradients, wide_norms

__all__ = ["wide_norms"]
pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)

JOBS: list[tuple[LoraSpec, tuple[int, ...], tuple[int, ...]]] = [
    (LoraSpec(rank=3, alpha=5.0), (0, 1, 2), (17, 6, 2)),
    (LoraSpec(rank=1, alpha=2.0, target_modules=("v_proj", "down_proj")), (0, 1, 2), (9, 13)),
    (LoraSpec(rank=5, alpha=3.0), (0, 1, 2), (11,)),
    (LoraSpec(rank=2, alpha=3.0, target_modules=("o_proj", "gate_proj")), (1, 2), (8,)),
]
"""Adapter, its layers, and the lengths of its sequences."""


class Stage:
    """Sequences of all jobs in one cache, forwarded, each at the start of its way back."""

    def __init__(self, model: Any, folder: Path, seed: int) -> None:
        self.decoder: Decoder = as_decoder(model, folder, torch.float64)
        self.cache: KvCache = new_cache(self.decoder)
        self.draw = random.Random(seed)
        slots = self.draw.sample(range(128), 128)
        self.adapters: list[LoraAdapter] = []
        self.grads: list[LoraWeights] = []
        self.items = []
        self.cursors: list[BackwardCursor] = []
        for i, (spec, layers, lengths) in enumerate(JOBS):
            adapter = random_adapter(self.decoder, spec, layers=layers, seed=i)
            grads = LoraWeights(spec, self.decoder.config, layers=layers, dtype=torch.float64)
            items = [training_slice(random_tokens(self.decoder, n, seed=10 * i + n)) for n in lengths]
            for item in items:
                sequence = training_sequence(item, self.decoder, adapter)
                own, slots = slots[: len(item.tokens)], slots[len(item.tokens) :]
                forward_sequence(self.decoder, self.cache, sequence, adapter, [self.draw.randint(1, 9)], own)
                self.cursors.append(BackwardCursor(self.decoder, adapter, grads, sequence))
            self.adapters.append(adapter)
            self.grads.append(grads)
            self.items.append(items)


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize(("family", "seed"), [("llama", 0), ("llama", 1), ("qwen2", 2)])
def test_jobs_that_share_units_get_pefts_gradients(family: str, seed: int, tmp_path: Path) -> None:
    model = tiny_model(family, seed=seed).double()
    stage = Stage(copy.deepcopy(model), tmp_path, seed)
    late = stage.draw.sample(stage.cursors, 3)
    here, shared = [cursor for cursor in stage.cursors if cursor not in late], 0
    while late or not all(cursor.is_done for cursor in here):
        if late and stage.draw.random() < 0.2:
            here.append(late.pop())
        shared += len({window.cursor.adapter for window in next_unit(here, 30)}) > 1
        advance(stage.decoder, stage.cache, here, stage.draw.randint(1, 60))
    assert shared > 0
    for adapter, grads, items in zip(stage.adapters, stage.grads, stage.items, strict=True):
        _, expected = peft_gradients(copy.deepcopy(model), adapter, items)
        assert grads.tensors.keys() == expected.keys()
        for name, tensor in grads.tensors.items():
            assert_close_in_norm(tensor, expected[name], FP64)


def test_a_job_that_is_not_finite_leaves_the_others_gradients_alone(tmp_path: Path) -> None:
    def gradients(spoil: bool) -> list[torch.Tensor]:
        stage = Stage(tiny_model(), tmp_path, 0)
        if spoil:
            stage.cursors[0].sequence.dx_TH[3, 5] = torch.inf
        while not all(cursor.is_done for cursor in stage.cursors):
            advance(stage.decoder, stage.cache, stage.cursors, 1000)
        return [grads.flat for grads in stage.grads]

    sound, spoiled = gradients(False), gradients(True)
    assert not spoiled[0].isfinite().all()
    for a, b in zip(sound[1:], spoiled[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_who_is_behind_catches_up_and_then_all_go_together(tmp_path: Path) -> None:
    stage = Stage(tiny_model(), tmp_path, 0)
    ahead, behind, other = (stage.cursors[i] for i in (0, 2, 5))
    assert [len(cursor.sequence.tokens) for cursor in (ahead, behind, other)] == [17, 2, 11]
    advance(stage.decoder, stage.cache, [ahead], 16 + 3)
    assert (ahead.layer, ahead.end) == (1, 13)
    cursors = [ahead, behind, other]
    (first, second) = next_unit(cursors, 100)
    assert (first.cursor, second.cursor) == (behind, other)
    advance(stage.decoder, stage.cache, cursors, 1 + 10)
    assert [window.num_rows for window in next_unit(cursors, 100)] == [13, 1, 10]
    assert [window.num_rows for window in next_unit(cursors, 15)] == [13, 1, 1]
    advance(stage.decoder, stage.cache, cursors, 13 + 1 + 10)
    assert [window.num_rows for window in next_unit(cursors, 100)] == [16, 1, 10]
    assert advance(stage.decoder, stage.cache, cursors, 1000) == 16 + 1 + 10
    assert all(cursor.is_done for cursor in cursors)
    assert next_unit(cursors, 100) == []
