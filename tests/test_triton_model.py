"""A tiny decoder through the Triton path against the torch path: logits of every kind of rows, and what training makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

import tests.triton_stage as stage
from common.messages import LoraSpec, OptimizerStep
from kernels import ops
from services.executor.batch import Segment, build_batch
from services.executor.finetune import new_job
from services.executor.model import Decoder
from services.executor.tape import ActivationTape
from tests.helpers import (
    CPU,
    as_decoder,
    assert_close_in_norm,
    new_cache,
    random_adapter,
    random_tokens,
    tiny_model,
    train_queued,
    training_slice,
)

pytestmark = pytest.mark.skipif(stage.HAS_GPU, reason="both paths run on one CPU here")
TREE = (-1, 0, 0, 1, 1, 2)
DEPTHS = (0, 1, 1, 2, 2, 2)
SPECS = (
    LoraSpec(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj")),
    LoraSpec(rank=4, alpha=4.0),
    LoraSpec(rank=3, alpha=2.0, target_modules=("k_proj", "o_proj", "up_proj", "down_proj")),
    LoraSpec(method="bottleneck", rank=3, non_linearity="gelu", target_modules=("o_proj", "down_proj")),
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen3": {"head_dim": 8},
}


def both_paths(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> tuple[Decoder, Decoder]:
    """The same weights in two decoders; the second one's layers are not fused into one operation."""
    model = tiny_model(family, num_hidden_layers=2, **FAMILIES[family])
    usual = as_decoder(model, folder, dtype)
    with monkeypatch.context() as patched:
        patched.setattr(ops, "interprets_triton", True)
        return usual, as_decoder(model, folder, dtype)


def passes(decoder: Decoder) -> list[Tensor]:
    """Logits of prompts with four adapters and none, then of a decode, a tree, a chunk and a training window at once."""
    tokens = [random_tokens(decoder, 20, seed=i) for i in range(len(SPECS) + 1)]
    adapters = [None, *(random_adapter(decoder, spec, seed=i) for i, spec in enumerate(SPECS))]
    cache = new_cache(decoder, 160)
    prompts = [
        Segment(
            tokens=tokens[i][:9], positions=range(9), context_slots=(), slots=range(30 * i, 30 * i + 9), adapter=adapters[i],
            wants_logits="last",
        )
        for i in range(len(SPECS) + 1)
    ]  # fmt: skip
    tape = ActivationTape(random_adapter(decoder, SPECS[1]).activation_plan(decoder.config.shape), 6, decoder.dtype, CPU)

    def after(i: int, rows: int, **fields: Any) -> Segment:
        context, slots = range(30 * i, 30 * i + 9), range(30 * i + 9, 30 * i + 9 + rows)
        usual = {"positions": range(9, 9 + rows), "adapter": adapters[i], "wants_logits": "all"}
        return Segment(tokens=tokens[i][9 : 9 + rows], context_slots=context, slots=slots, **usual | fields)

    mixed = [
        after(0, 1),
        after(1, 6, parents=TREE, positions=[9 + depth for depth in DEPTHS]),
        after(2, 7),
        after(4, 3),
        after(3, 6, tape=tape),
    ]
    logits = []
    for segments in (prompts, mixed):
        batch = build_batch(segments, decoder.device)
        logits.append(decoder.logits(decoder.forward(batch, cache)[batch.logit_rows]))
    return logits


@pytest.mark.parametrize(("family", "dtype"), [("mistral", torch.float32), ("qwen3", torch.float16)])
def test_logits_of_a_whole_pass(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, ours = both_paths(family, tmp_path, monkeypatch, dtype)
    expected = passes(usual)
    monkeypatch.setattr(ops, "interprets_triton", True)
    for actual, wanted in zip(passes(ours), expected, strict=True):
        assert_close_in_norm(actual, wanted.double(), 1e-5 if dtype == torch.float32 else 2e-2)


def train(decoder: Decoder, spec: LoraSpec) -> tuple[Tensor, list[float]]:
    """The adapter after two steps of two sequences each, in windows that do not divide them, and the losses."""
    job = new_job("job", spec, 3, decoder, cache := new_cache(decoder))
    step = OptimizerStep(learning_rate=0.02, weight_decay=0.1, max_grad_norm=0.5)
    for i in range(4):
        weights = [0.0, *([0.1] * (3 + 2 * (i % 2)))]
        item = training_slice(
            random_tokens(decoder, len(weights), seed=i), weights, step=i // 2, index=i % 2, optimizer=step if i % 2 else None
        )
        job.accept(item)
    results = train_queued(job, decoder, cache, forward=(4, 3), backward=3)
    return job.adapter.weights.flat, [result.loss for result in results]


@pytest.mark.parametrize("chosen", [LoraSpec(rank=3, alpha=6.0), SPECS[-1]], ids=["lora", "bottleneck"])
def test_training_steps_with_dropout(chosen: LoraSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = msgspec.structs.replace(chosen, dropout=0.3)
    usual, ours = both_paths("llama", tmp_path, monkeypatch, torch.float32)
    weights, losses = train(usual, spec)
    monkeypatch.setattr(ops, "interprets_triton", True)
    ours_weights, ours_losses = train(ours, spec)
    assert ours_losses == pytest.approx(losses, rel=1e-5)
    assert_close_in_norm(ours_weights, weights.double(), 1e-4)
