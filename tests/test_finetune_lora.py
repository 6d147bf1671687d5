"""Adapters: PEFT folders in and out, the update of fused linears, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

from common.messages import AdapterRecord, LoraSpec
from services.cli import adapters
from services.executor.adapter_spec import MODULES, InvalidAdapterError, check_spec
from services.executor.batch import Segment, build_batch
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder
from tests.helpers import (
    CPU,
    PEFT_WARNING,
    as_decoder,
    assert_matches,
    new_cache,
    randn,
    random_adapter,
    random_tokens,
    tiny_model,
)

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)

SPECS = {
    "all targets": LoraSpec(rank=3, alpha=6.0),
    "two targets": LoraSpec(rank=4, alpha=2.0, target_modules=("q_proj", "v_proj")),
    "odd alpha": LoraSpec(rank=2, alpha=0.7, target_modules=("up_proj", "down_proj")),
    "rslora": LoraSpec(rank=4, alpha=3.0, target_modules=("q_proj", "down_proj"), use_rslora=True),
}


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture
def decoder(model: Any, tmp_path: Path) -> Decoder:
    return as_decoder(model, tmp_path / "model")


def adapted_logits(decoder: Decoder, adapter: LoraAdapter, tokens: list[int]) -> Tensor:
    rows = range(len(tokens))
    segment = Segment(tokens=tokens, positions=rows, context_slots=(), slots=rows, adapter=adapter, wants_logits="all")
    return decoder.logits(decoder.forward(build_batch([segment], CPU), new_cache(decoder)))


def write_folder(adapter: LoraAdapter, folder: Path) -> Path:
    """The folder as `heddle adapters export` writes it."""
    record = AdapterRecord(name=adapter.name, base_model="tiny", artifact="a", lora=adapter.spec, created_at=0.0)
    adapters.write_folder(folder, record, adapter.to_safetensors())
    return folder


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_peft_loads_what_we_write_and_computes_the_same_logits(
    spec: LoraSpec, model: Any, decoder: Decoder, tmp_path: Path
) -> None:
    adapter = random_adapter(decoder, spec)
    tokens = random_tokens(decoder, 17)
    theirs = peft.PeftModel.from_pretrained(model, write_folder(adapter, tmp_path / "adapter"))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([tokens])).logits[0]
        plain = theirs.get_base_model()
        with theirs.disable_adapter():
            unadapted = plain(input_ids=torch.tensor([tokens])).logits[0]
    actual = adapted_logits(decoder, adapter, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (actual - unadapted).abs().max() > 0.1


def test_we_load_what_peft_writes(model: Any, decoder: Decoder, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["k_proj", "gate_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    data = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    spec = LoraSpec(rank=3, alpha=6.0, target_modules=("k_proj", "gate_proj"))
    adapter = LoraAdapter.from_safetensors("mine", spec, data, decoder.config)
    tokens = random_tokens(decoder, 17)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(adapted_logits(decoder, adapter, tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_written_adapter_comes_back_to_the_bit(decoder: Decoder) -> None:
    adapter = random_adapter(decoder, SPECS["all targets"])
    again = LoraAdapter.from_safetensors("again", adapter.spec, adapter.to_safetensors(), decoder.config)
    assert torch.equal(again.weights.flat, adapter.weights.flat)
    assert again.scale == adapter.scale == 2.0
    assert again.layers == (0, 1, 2)


def test_half_precision_files_are_widened(decoder: Decoder) -> None:
    adapter = random_adapter(decoder, SPECS["all targets"])
    half = {name: tensor.bfloat16() for name, tensor in adapter.weights.tensors.items()}
    again = LoraAdapter.from_safetensors("again", adapter.spec, safetensors.torch.save(half), decoder.config)
    assert again.weights.flat.dtype == torch.float32
    assert torch.equal(again.weights.flat, adapter.weights.flat.bfloat16().float())


def test_targets_of_a_fused_linear_update_their_own_columns(decoder: Decoder) -> None:
    adapter = random_adapter(decoder, LoraSpec(rank=2, alpha=3.0, target_modules=("k_proj", "up_proj", "o_proj")))
    sizes = {"qkv": (24, 40), "o": (24, 24), "gate_up": (24, 80), "down": (40, 24)}
    columns = {"qkv": slice(24, 32), "o": slice(0, 24), "gate_up": slice(40, 80), "down": slice(0, 0)}
    for module, (num_in, num_out) in sizes.items():
        x, y = randn(5, num_in).float(), randn(5, num_out, seed=1).float()
        before = y.clone()
        adapter.apply(1, module, y, x)
        changed = y != before
        assert changed[:, columns[module]].all()
        assert changed.sum() == 5 * len(range(num_out)[columns[module]])
        assert adapter.has(1, module) == bool(changed.any())


def test_an_adapter_updates_as_its_product_matrix_does(decoder: Decoder) -> None:
    adapter = random_adapter(decoder, SPECS["all targets"])
    key = "base_model.model.model.layers.2.mlp.down_proj.lora_{}.weight"
    a, b = (adapter.weights.tensors[key.format(letter)].double() for letter in "AB")
    x, y = randn(5, 40, dtype=torch.float32), randn(5, 24, dtype=torch.float32, seed=1)
    actual = y.float()
    adapter.apply(2, "down", actual, x.float())
    assert_matches(actual, y + 2.0 * x @ (b @ a).T)


def test_all_matrices_are_views_of_one_tensor_without_gaps(decoder: Decoder) -> None:
    weights = LoraWeights(SPECS["all targets"], decoder.config)
    for i, tensor in enumerate(weights.tensors.values()):
        tensor.fill_(i + 1)
    counts = torch.bincount(weights.flat.long())
    assert counts.tolist() == [0, *(tensor.numel() for tensor in weights.tensors.values())]
    assert len(weights.linears) == decoder.config.num_layers * len(MODULES)


def changed_file(adapter: LoraAdapter, **changes: Tensor | None) -> bytes:
    """The adapter's file with tensors of layer 0's q_proj replaced or (None) removed, or an extra one."""
    tensors = dict(adapter.weights.tensors)
    for name, tensor in changes.items():
        key = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{name}.weight"
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    return safetensors.torch.save(tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": None}, "adapter x lacks .*layers.0.self_attn.q_proj.lora_A.weight and 0 more"),
        ({"C": torch.zeros(1)}, "adapter x has unknown .*lora_C.weight"),
        (
            {"A": torch.zeros(3, 32)},
            r"has shape \(3, 32\), rank and base model ask for \(3, 24\); was it made for another model",
        ),
        ({"A": torch.zeros(4, 24)}, r"has shape \(4, 24\)"),
        ({"B": torch.full((24, 3), torch.nan)}, "holds values that are not finite"),
    ],
)
def test_files_that_do_not_fit_are_refused(changes: dict[str, Tensor | None], message: str, decoder: Decoder) -> None:
    adapter = random_adapter(decoder, SPECS["all targets"])
    data = changed_file(adapter, **changes)
    with pytest.raises(InvalidAdapterError, match=message):
        LoraAdapter.from_safetensors("x", adapter.spec, data, decoder.config)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\xff" * 64])
def test_bytes_that_are_not_safetensors_are_refused(data: bytes, decoder: Decoder) -> None:
    with pytest.raises(InvalidAdapterError, match="adapter x is not in safetensors format"):
        LoraAdapter.from_safetensors("x", LoraSpec(), data, decoder.config)


def test_a_refused_file_changes_nothing(decoder: Decoder) -> None:
    adapter = random_adapter(decoder, SPECS["all targets"])
    before = adapter.weights.flat.clone()
    tensors = {name: torch.zeros_like(tensor) for name, tensor in adapter.weights.tensors.items()}
    tensors[list(tensors)[-1]].fill_(torch.inf)
    with pytest.raises(InvalidAdapterError):
        adapter.weights.copy_from(tensors, "file")
    assert torch.equal(adapter.weights.flat, before)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LoraSpec(rank=0), "rank must be at least 1, not 0"),
        (LoraSpec(alpha=0.0), "alpha must be positive"),
        (LoraSpec(alpha=float("nan")), "alpha must be positive"),
        (LoraSpec(target_modules=()), "target_modules must be some of .*, not none"),
        (LoraSpec(target_modules=("q_proj", "lm_head")), "target_modules must be some of .*, not lm_head"),
    ],
)
def test_impossible_specifications_are_refused(spec: LoraSpec, message: str) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        check_spec(spec)
