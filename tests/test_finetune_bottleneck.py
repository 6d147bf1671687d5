"""Bottleneck adapters against autograd through plain modules: gradients in any windows; what is kept is what is planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from common.activation_plan import plan_activations
from common.bypasses import bypasses_of
from common.messages import LoraSpec
from services.executor.adapter_spec import InvalidAdapterError, check_spec
from services.executor.backward import advance
from services.executor.backward_cursor import BackwardCursor
from services.executor.dropout import RowDropout
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.training_sequence import TrainingSequence
from tests import test_finetune_gradients as gradients
from tests.bottleneck_oracle import Drop, oracle_gradients, random_bottleneck
from tests.helpers import (
    CPU,
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
from tests.test_finetune_ia3 import random_ia3

wide_norms = gradients.wide_norms
torch.set_num_threads(1)  # a tiny operation takes microseconds, to share it among threads up to milliseconds

BOTH = ("o_proj", "down_proj")
HOULSBY = LoraSpec(method="bottleneck", rank=3, non_linearity="relu", target_modules=BOTH)
SPECS = {
    "houlsby": HOULSBY,
    "pfeiffer": LoraSpec(method="bottleneck", rank=5, non_linearity="gelu", target_modules=("down_proj",)),
    "attention": LoraSpec(method="bottleneck", rank=2, non_linearity="gelu", target_modules=("o_proj",)),
    "wide": LoraSpec(method="bottleneck", rank=32, non_linearity="relu", target_modules=BOTH),
    "narrow": LoraSpec(method="bottleneck", rank=1, non_linearity="gelu", target_modules=BOTH),
}


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
def test_any_windows_give_autograds_gradients_in_fp64(spec: LoraSpec, layers: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny_model().double()
    decoder = as_decoder(model, tmp_path, torch.float64)
    adapter = random_bottleneck(decoder, spec, layers=layers)
    items = [training_slice(random_tokens(decoder, 17)), training_slice(random_tokens(decoder, 5, 1), [0, 0, 0.5, 0, 0.25])]
    _, grads = gradients.windowed_gradients(decoder, adapter, items)
    gradients.assert_gradients_match(grads, oracle_gradients(model, adapter, items), 1e-9)


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("spec", [SPECS["houlsby"], SPECS["narrow"]], ids=["houlsby", "narrow"])
def test_any_windows_give_autograds_gradients_in_fp32(spec: LoraSpec, tmp_path: Path) -> None:
    """Of the model with biases; the oracle is the same model in fp64."""
    decoder = as_decoder(tiny_model("qwen2"), tmp_path)
    adapter, item = random_bottleneck(decoder, spec), training_slice(random_tokens(decoder, gradients.NUM_TOKENS))
    _, grads = gradients.windowed_gradients(decoder, adapter, [item])
    wide = LoraWeights(spec, decoder.config, dtype=torch.float64)
    wide.flat.copy_(adapter.weights.flat)
    expected = oracle_gradients(tiny_model("qwen2").double(), LoraAdapter("wide", spec, wide), [item])
    rival = oracle_gradients(tiny_model("qwen2"), adapter, [item])
    assert gradients.mean_error(grads.tensors, expected) <= max(1e-5, 4 * gradients.mean_error(rival, expected))


def test_a_bf16_model_trains_an_fp32_adapter_as_exactly_as_torch_does(tmp_path: Path) -> None:
    """As for LoRA in test_finetune_gradients: the oracle has the bf16 model's weights in fp32, torch's is the bf16 model."""
    narrow, wide = (tiny_model(initializer_range=0.15).bfloat16() for _ in range(2))
    decoder = as_decoder(narrow, tmp_path, torch.bfloat16)
    adapter, item = random_bottleneck(decoder, HOULSBY), training_slice(random_tokens(decoder, gradients.NUM_TOKENS))
    _, grads = gradients.windowed_gradients(decoder, adapter, [item])
    assert grads.flat.dtype == torch.float32
    expected = oracle_gradients(wide.float(), adapter, [item])
    rival = oracle_gradients(narrow, adapter, [item])
    assert gradients.mean_error(grads.tensors, expected) <= 1.2 * gradients.mean_error(rival, expected) < 0.1


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("name", ["houlsby", "narrow"])
def test_dropout_is_autograds_with_the_same_masks(name: str, tmp_path: Path) -> None:
    """As torch's: what is not dropped is scaled before the activation, which gelu would show."""
    model = tiny_model().double()
    decoder = as_decoder(model, tmp_path, torch.float64)
    spec, rate = msgspec.structs.replace(SPECS[name], dropout=0.3), 0.3
    adapter, item = random_bottleneck(decoder, spec), training_slice(random_tokens(decoder, 17))
    rows = RowDropout.of_sequence(rate, seed=7, step=0, index=0, num_rows=17, device=CPU)
    assert rows is not None

    def drop(layer: int, module: str) -> Drop:
        return lambda y: y * rows.drop(layer, module, torch.ones_like(y[0])) / (1 - rate)

    drops = {
        f"model.layers.{layer}.{block}.{target}": drop(layer, module)
        for layer in range(3)
        for module, block, target in (("o", "self_attn", "o_proj"), ("down", "mlp", "down_proj"))
    }
    trained, cache = adapter.in_training(), new_cache(decoder)
    grads = LoraWeights(spec, decoder.config, dtype=torch.float64)
    sequence = TrainingSequence(item, decoder, adapter.activation_plan(decoder.config.shape), dropout=rate, seed=7)
    forward_sequence(decoder, cache, sequence, trained, [5, 1, 3], range(17))
    cursor = BackwardCursor(decoder, trained, grads, sequence)
    while not cursor.is_done:
        advance(decoder, cache, [cursor], 7)
    gradients.assert_gradients_match(grads, oracle_gradients(model, adapter, [item], drops), 1e-9)


def test_jobs_of_all_methods_share_units(tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model().double(), tmp_path, torch.float64)
    ia3 = LoraSpec(method="ia3", target_modules=BOTH)
    trained = [random_adapter(decoder, LoraSpec(rank=2)), *(random_bottleneck(decoder, spec) for spec in SPECS.values())]
    trained += [random_ia3(decoder, ia3), random_bottleneck(decoder, HOULSBY, seed=4)]
    items = [training_slice(random_tokens(decoder, 9 + 2 * i, seed=i)) for i in range(len(trained))]
    cache, alone, cursors = new_cache(decoder, 256), [], []
    for number, (adapter, item) in enumerate(zip(trained, items, strict=True)):
        alone.append(gradients.windowed_gradients(decoder, adapter, [item])[1])
        sequence = training_sequence(item, decoder, adapter)
        slots = range(30 * number, 30 * number + len(item.tokens))
        forward_sequence(decoder, cache, sequence, adapter, [4, 3], slots)
        grads = LoraWeights(adapter.spec, decoder.config, dtype=torch.float64)
        cursors.append(BackwardCursor(decoder, adapter, grads, sequence))
    assert len({cursor.kind for cursor in cursors}) < len({adapter.spec for adapter in trained})
    while not all(cursor.is_done for cursor in cursors):
        advance(decoder, cache, cursors, 50)
    for cursor, expected in zip(cursors, alone, strict=True):
        assert_close_in_norm(cursor.grads.flat, expected.flat, 1e-9)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_bytes_planned_are_bytes_allocated(spec: LoraSpec, layers: tuple[int, ...], share: float, tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model(), tmp_path)
    adapter, item = random_bottleneck(decoder, spec, layers=layers), training_slice(random_tokens(decoder, 11))
    config = {
        "peft_type": "BOTTLENECK", "bottleneck_size": spec.rank, "non_linearity": spec.non_linearity,
        "target_modules": list(spec.target_modules), "layers_to_transform": list(layers),
    }  # fmt: skip
    plan = plan_activations(decoder.config.shape, bypasses_of(config, decoder.config.shape), share)
    assert plan == adapter.activation_plan(decoder.config.shape, share)
    sequence, cache = TrainingSequence(item, decoder, plan), new_cache(decoder)
    assert sequence.tape.num_bytes == plan.tape_width * 10 * 4 > 0
    forward_sequence(decoder, cache, sequence, adapter, [4, 3], range(10))
    grads = LoraWeights(spec, decoder.config, layers=layers)
    advance(decoder, cache, [BackwardCursor(decoder, adapter, grads, sequence)], 1000)
    expected = gradients.windowed_gradients(decoder, adapter, [item])[1]
    assert_close_in_norm(grads.flat, expected.flat, 1e-5)


def test_a_new_adapter_changes_nothing(tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model(), tmp_path)
    new = LoraAdapter.initialized("new", HOULSBY, decoder.config, seed=3)
    assert all(found.up_HR.eq(0).all() and found.down_RH.ne(0).all() for found in new.weights.bottlenecks.values())
    assert torch.equal(new.weights.flat, LoraAdapter.initialized("again", HOULSBY, decoder.config, seed=3).weights.flat)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"non_linearity": ""}, "non_linearity must be relu or gelu"),
        ({"method": "lora"}, "non_linearity belongs to the method bottleneck"),
        (
            {"target_modules": ("o_proj", "q_proj")},
            "of a bottleneck adapter may be o_proj, down_proj, not q_proj",
        ),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_impossible_specifications_are_refused_by_field(settings: dict[str, Any], reason: str) -> None:
    usual = {"method": "bottleneck", "non_linearity": "relu", "target_modules": BOTH}
    with pytest.raises(InvalidAdapterError, match=reason):
        check_spec(LoraSpec(**(usual | settings)))
