"""Windowed forward and backward against Hugging Face PEFT: whole-sequence autograd through transformers."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from common.messages import LoraSpec, TrainingSlice
from services.executor import backward
from services.executor.adapter_spec import TARGETS
from services.executor.backward import advance
from services.executor.backward_cursor import BackwardCursor
from services.executor.loader import load_decoder
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder
from tests.helpers import (
    CPU,
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

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)

FP64, FP32 = 1e-9, 1e-5
NUM_TOKENS = 29


@pytest.fixture
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms in fp32 even for fp64 models; an fp64 oracle needs them in fp64."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        variance = hidden.square().mean(-1, keepdim=True)
        normed: Tensor = self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))
        return normed

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(Qwen2RMSNorm, "forward", forward)


def peft_gradients(model: Any, adapter: LoraAdapter, items: Sequence[TrainingSlice]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by PEFT's names; turns `model` into a PEFT model."""
    config = peft.LoraConfig(
        r=adapter.spec.rank,
        lora_alpha=int(adapter.spec.alpha),
        target_modules=list(adapter.spec.target_modules),
        layers_to_transform=list(adapter.layers),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    peft.set_peft_model_state_dict(model, {name: tensor.clone() for name, tensor in adapter.weights.tensors.items()})
    loss = torch.zeros((), dtype=model.dtype)
    for item in items:
        logits = model(input_ids=torch.tensor([item.tokens])).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.tensor(item.tokens[1:]), reduction="none")
        loss = loss + (losses * torch.tensor(item.weights[1:], dtype=losses.dtype)).sum()
    torch.autograd.backward(loss)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return float(loss.detach()), {name.replace(".default.", "."): grad for name, grad in grads.items() if grad is not None}


def windowed_gradients(
    decoder: Decoder, adapter: LoraAdapter, items: Sequence[TrainingSlice], seed: int = 0
) -> tuple[float, LoraWeights]:
    """Loss and gradients through random forward windows, random backward pieces and scattered cache slots."""
    draw = random.Random(seed)
    grads = LoraWeights(adapter.spec, decoder.config, layers=adapter.layers, dtype=adapter.weights.flat.dtype)
    loss = 0.0
    for item in items:
        cache, slots = new_cache(decoder), draw.sample(range(128), len(item.tokens))
        sequence = training_sequence(item, decoder, adapter)
        windows = [draw.randint(1, 13) for _ in item.tokens]
        forward_sequence(decoder, cache, sequence, adapter, windows, slots)
        cursor = BackwardCursor(decoder, adapter, grads, sequence)
        while not cursor.is_done:
            before, budget = cursor.remaining_token_layers, draw.randint(1, 40)
            done = advance(decoder, cache, [cursor], budget)
            assert done == min(budget, before) == before - cursor.remaining_token_layers
        loss += sequence.loss
    return loss, grads


def assert_gradients_match(actual: LoraWeights, expected: dict[str, Tensor], rel: float) -> None:
    assert actual.tensors.keys() == expected.keys()
    for name, tensor in actual.tensors.items():
        assert_close_in_norm(tensor, expected[name], rel)


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("seed", range(3))
def test_any_windows_give_pefts_gradients_in_fp64(family: str, seed: int, tmp_path: Path) -> None:
    model = tiny_model(family, seed=seed).double()
    decoder = as_decoder(model, tmp_path, torch.float64)
    adapter = random_adapter(decoder, LoraSpec(rank=3, alpha=5.0), seed=seed)
    items = [training_slice(random_tokens(decoder, NUM_TOKENS, seed))]
    loss, grads = windowed_gradients(decoder, adapter, items, seed)
    expected_loss, expected = peft_gradients(model, adapter, items)
    assert loss == pytest.approx(expected_loss, rel=FP64)
    assert_gradients_match(grads, expected, FP64)


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "tie_word_embeddings": False},
    ],
)
def test_any_windows_give_pefts_gradients_in_fp32(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**options)
    decoder = as_decoder(model, tmp_path)
    adapter = random_adapter(decoder, LoraSpec(rank=3, alpha=5.0))
    items = [training_slice(random_tokens(decoder, NUM_TOKENS))]
    loss, grads = windowed_gradients(decoder, adapter, items)
    expected_loss, expected = peft_gradients(copy.deepcopy(model).double(), adapter, items)
    _, rival = peft_gradients(model, adapter, items)
    assert loss == pytest.approx(expected_loss, rel=FP32)
    assert mean_error(grads.tensors, expected) <= max(FP32, 4 * mean_error(rival, expected))


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("targets", [(target,) for target in TARGETS] + [("q_proj", "v_proj"), ("up_proj", "o_proj")])
@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 2), (1,)])
def test_any_targets_and_layers(targets: tuple[str, ...], layers: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny_model().double()
    decoder = as_decoder(model, tmp_path, torch.float64)
    adapter = random_adapter(decoder, LoraSpec(rank=2, alpha=3.0, target_modules=targets), layers=layers)
    items = [training_slice(random_tokens(decoder, 13))]
    _, grads = windowed_gradients(decoder, adapter, items)
    assert_gradients_match(grads, peft_gradients(model, adapter, items)[1], FP64)


@pytest.mark.usefixtures("wide_norms")
def test_slices_of_a_step_add_up_and_loss_weights_count(tmp_path: Path) -> None:
    model = tiny_model().double()
    decoder = as_decoder(model, tmp_path, torch.float64)
    adapter = random_adapter(decoder, LoraSpec(rank=3, alpha=5.0))
    prompt_masked = [0.0] * 9 + [0.07] * 8 + [0.0] * 3
    uneven = [0.9, 0.0, 0.5, 0.0, 0.0, 0.25, 0.125]
    items = [
        training_slice(random_tokens(decoder, 20, seed=1), prompt_masked),
        training_slice(random_tokens(decoder, 7, seed=2), uneven),
        training_slice(random_tokens(decoder, 2, seed=3)),
        training_slice(random_tokens(decoder, 6, seed=4), [0.0] * 6),
        training_slice(random_tokens(decoder, 1, seed=5), [1.0]),
    ]
    loss, grads = windowed_gradients(decoder, adapter, items)
    expected_loss, expected = peft_gradients(
        model, adapter, [*items[:1], training_slice(items[1].tokens, [0.0, *uneven[1:]]), items[2]]
    )
    assert loss == pytest.approx(expected_loss, rel=FP64)
    assert_gradients_match(grads, expected, FP64)


@pytest.mark.usefixtures("wide_norms")
def test_long_windows_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "MAX_WINDOW_TOKENS", 4)
    model = tiny_model().double()
    decoder = as_decoder(model, tmp_path, torch.float64)
    adapter = random_adapter(decoder, LoraSpec(rank=3, alpha=5.0))
    items = [training_slice(random_tokens(decoder, NUM_TOKENS))]
    _, grads = windowed_gradients(decoder, adapter, items)
    assert_gradients_match(grads, peft_gradients(model, adapter, items)[1], FP64)


def test_a_bf16_model_trains_an_fp32_adapter_as_exactly_as_peft_does(tmp_path: Path) -> None:
    narrow_model = tiny_model(initializer_range=0.15).bfloat16()
    wide_model = tiny_model(initializer_range=0.15).bfloat16().float()
    decoder = as_decoder(narrow_model, tmp_path, torch.bfloat16)
    adapter = random_adapter(decoder, LoraSpec(rank=3, alpha=5.0))
    items = [training_slice(random_tokens(decoder, NUM_TOKENS))]
    loss, grads = windowed_gradients(decoder, adapter, items)
    expected_loss, expected = peft_gradients(wide_model, adapter, items)
    _, rival = peft_gradients(narrow_model, adapter, items)
    assert grads.flat.dtype == torch.float32
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert mean_error(grads.tensors, expected) <= 1.2 * mean_error(rival, expected) < 0.1


def mean_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    errors = [float((actual[name].to(wanted.dtype) - wanted).norm() / wanted.norm()) for name, wanted in expected.items()]
    return sum(errors) / len(errors)


@pytest.mark.real_model
def test_a_windowed_step_of_the_real_model_has_pefts_gradient(real_model_dir: Path) -> None:
    decoder = load_decoder(real_model_dir, torch.float32, CPU)
    adapter = random_adapter(decoder, LoraSpec(rank=8, alpha=16.0))
    adapter.weights.flat.mul_(0.1)
    items = [training_slice(random_tokens(decoder, 120), [0.0] * 40 + [1 / 80] * 80)]
    model = transformers.AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32)
    expected_loss, expected = peft_gradients(model, adapter, items)
    grads = LoraWeights(adapter.spec, decoder.config)
    cache, sequence = new_cache(decoder), training_sequence(items[0], decoder, adapter)
    forward_sequence(decoder, cache, sequence, adapter, [50, 39], range(120))
    cursor = BackwardCursor(decoder, adapter, grads, sequence)
    while not cursor.is_done:
        advance(decoder, cache, [cursor], 1000)
    assert sequence.loss == pytest.approx(expected_loss, rel=1e-5)
    mine, theirs = (torch.cat([tensors[name].flatten() for name in expected]) for tensors in (grads.tensors, expected))
    assert_close_in_norm(mine, theirs, FP32)


def test_nothing_runs_below_the_lowest_adapted_layer_and_the_tape_is_freed(tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model(), tmp_path)
    adapter = random_adapter(decoder, LoraSpec(rank=2), layers=(1, 2))
    cache = new_cache(decoder)
    sequence = training_sequence(training_slice(random_tokens(decoder, 11)), decoder, adapter)
    forward_sequence(decoder, cache, sequence, adapter, [11], range(11))
    grads = LoraWeights(adapter.spec, decoder.config, layers=adapter.layers)
    cursor = BackwardCursor(decoder, adapter, grads, sequence)
    plan, row_bytes = adapter.activation_plan(decoder.config.shape), 10 * decoder.dtype.itemsize
    lowest, top = (row_bytes * sum(tensor.width for tensor in layer.tape) for layer in plan.layers[1:])
    assert sequence.tape.num_bytes == lowest + top == row_bytes * plan.tape_width
    assert cursor.remaining_token_layers == 2 * 10
    assert advance(decoder, cache, [cursor], 10) == 10
    assert sequence.tape.num_bytes == lowest > 0
    assert advance(decoder, cache, [cursor], 1000) == 10
    assert cursor.is_done
    assert sequence.tape.num_bytes == 0


def test_rows_after_the_last_predicted_token_are_not_needed(tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model(), tmp_path)
    tokens = random_tokens(decoder, 8)
    assert training_sequence(training_slice(tokens), decoder).num_rows == 7
    assert training_sequence(training_slice(tokens, [0, 0, 1, 1, 0, 0, 0, 0]), decoder).num_rows == 3
    empty = training_sequence(training_slice(tokens, [1, 0, 0, 0, 0, 0, 0, 0]), decoder)
    assert (empty.num_rows, empty.num_tokens, empty.is_forwarded) == (0, 0, True)


@pytest.mark.parametrize(("start", "rows"), [(1, 2), (0, 0), (0, 8)])
def test_windows_must_follow_each_other(start: int, rows: int, tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model(), tmp_path)
    sequence = training_sequence(training_slice(random_tokens(decoder, 8)), decoder)
    with pytest.raises(ValueError, match="after 0 of 7 rows"):
        sequence.head(torch.zeros(rows, decoder.config.hidden_size), start)
