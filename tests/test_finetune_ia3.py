"""(IA)3 against Hugging Face PEFT: served logits, and gradients through windows; what is kept is what is planned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from common.activation_plan import plan_activations
from common.bypasses import bypasses_of
from common.messages import AdapterRecord, LoraSpec
from common.peft_folder import WEIGHTS, PeftFolderError, read_peft_folder
from services.cli import adapters
from services.executor.adapter_spec import INPUT_SCALED, TARGETS, InvalidAdapterError, check_spec
from services.executor.backward import advance
from services.executor.backward_cursor import BackwardCursor
from services.executor.batch import Segment, build_batch
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder
from services.executor.training_sequence import TrainingSequence
from tests import test_finetune_gradients as gradients
from tests.helpers import (
    CPU,
    PEFT_WARNING,
    as_decoder,
    assert_close_in_norm,
    forward_sequence,
    new_cache,
    randn,
    random_adapter,
    random_tokens,
    tiny_model,
    training_sequence,
    training_slice,
)

wide_norms = gradients.wide_norms
pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)
torch.set_num_threads(1)  # a tiny operation takes microseconds, to share it among threads up to milliseconds

USUAL = LoraSpec(method="ia3", target_modules=("k_proj", "v_proj", "down_proj"), feedforward_modules=("down_proj",))
SPECS = {
    "usual": USUAL,
    "outputs": LoraSpec(method="ia3"),
    "inputs": LoraSpec(method="ia3", target_modules=("o_proj", "down_proj"), feedforward_modules=("o_proj", "down_proj")),
    "mixed": LoraSpec(
        method="ia3", target_modules=("q_proj", "o_proj", "up_proj", "down_proj"), feedforward_modules=("o_proj",)
    ),
}


def random_ia3(decoder: Decoder, spec: LoraSpec, *, layers: tuple[int, ...] | None = None, seed: int = 0) -> LoraAdapter:
    dtype = torch.promote_types(decoder.dtype, torch.float32)
    weights = LoraWeights(spec, decoder.config, layers=layers, dtype=dtype)
    weights.flat.copy_(1 + 0.3 * randn(*weights.flat.shape, seed=seed))
    return LoraAdapter("adapter", spec, weights)


def peft_model(model: Any, adapter: LoraAdapter) -> Any:
    spec = adapter.spec
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=rf".*\.({'|'.join(map(str, adapter.layers))})\..*({'|'.join(spec.target_modules)})",
        feedforward_modules=rf".*({'|'.join(spec.feedforward_modules) or 'none'})",
    )
    adapted = peft.get_peft_model(model, config)
    weights = {name: tensor.clone() for name, tensor in adapter.weights.tensors.items()}
    left: Any = peft.set_peft_model_state_dict(adapted, weights)
    assert not left.unexpected_keys
    return adapted


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_logits_are_pefts_beside_a_lora_adapter(spec: LoraSpec, tmp_path: Path) -> None:
    model = tiny_model()
    decoder = as_decoder(model, tmp_path)
    lora, own, other = random_adapter(decoder, LoraSpec(rank=2)), random_ia3(decoder, spec), random_ia3(decoder, USUAL, seed=1)
    served = LoraAdapter.from_safetensors("served", spec, own.to_safetensors(), decoder.config)
    tokens, rows = random_tokens(decoder, 11), range(11)

    def logits(*chosen: LoraAdapter | None) -> Tensor:
        segments = [
            Segment(
                tokens=tokens, positions=rows, context_slots=(), slots=range(20 * i, 20 * i + 11), adapter=adapter,
                wants_logits="all",
            )
            for i, adapter in enumerate(chosen)
        ]  # fmt: skip
        return decoder.logits(decoder.forward(build_batch(segments, CPU), new_cache(decoder)))

    together = torch.split(logits(lora, served, None, other), 11)
    alone = [logits(adapter) for adapter in (lora, served, None, other)]
    for found, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = peft_model(model, own)(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(together[1], expected, rtol=1e-4, atol=1e-4)
    assert (together[1] - together[2]).abs().max() > 0.1


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_folders_go_to_peft_and_come_back(spec: LoraSpec, tmp_path: Path) -> None:
    model = tiny_model()
    decoder = as_decoder(model, tmp_path / "model")
    adapter = random_ia3(decoder, spec)
    record = AdapterRecord(name="mine", base_model=str(tmp_path / "model"), artifact="a", lora=spec, created_at=0.0)
    adapters.write_folder(tmp_path / "ours", record, adapter.to_safetensors())
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    found = read_peft_folder(tmp_path / "theirs")
    assert found.lora == read_peft_folder(tmp_path / "ours").lora == spec
    again = LoraAdapter.from_safetensors("again", found.lora, found.weights, decoder.config)
    assert torch.equal(again.weights.flat, adapter.weights.flat)


def test_damaged_folders_are_refused_by_tensor(tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model(), tmp_path / "model")
    tensors = random_ia3(decoder, USUAL).weights.tensors
    key = "base_model.model.model.layers.{}.mlp.down_proj.ia3_l"
    for number, (changed, reason) in enumerate([
        ({key.format(2): tensors[key.format(2)].reshape(-1, 1)}, "down_proj in layer 2"),
        ({key.format(1): torch.ones(4, 4)}, "no vector"),
        ({key.format(0).replace("down_proj", "fc1"): torch.ones(1, 4)}, "is not supported"),
        ({key.format(4): torch.ones(1, 40)}, "in layer 3"),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
        safetensors.torch.save_file({name: t.contiguous() for name, t in (tensors | changed).items()}, folder / WEIGHTS)
        with pytest.raises(PeftFolderError, match=reason):
            read_peft_folder(folder)


def test_a_new_adapter_changes_nothing(tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model(), tmp_path)
    assert LoraAdapter.initialized("new", USUAL, decoder.config, seed=3).weights.flat.eq(1).all()


def peft_gradients(model: Any, adapter: LoraAdapter, tokens: Sequence[int]) -> dict[str, Tensor]:
    adapted = peft_model(model, adapter)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("ia3_l" in name)
    logits = adapted(input_ids=torch.tensor([tokens])).logits[0, :-1]
    torch.autograd.backward(F.cross_entropy(logits, torch.tensor(tokens[1:])))
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    return {name.replace(".default", ""): grad for name, grad in grads.items()}


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
def test_any_windows_give_pefts_gradients_in_fp64(spec: LoraSpec, layers: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny_model().double()
    decoder = as_decoder(model, tmp_path, torch.float64)
    adapter = random_ia3(decoder, spec, layers=layers)
    item = training_slice(random_tokens(decoder, 17))
    _, grads = gradients.windowed_gradients(decoder, adapter, [item])
    gradients.assert_gradients_match(grads, peft_gradients(model, adapter, item.tokens), 1e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_a_single_target_of_the_lowest_layer(target: str, tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model("qwen2"), tmp_path)
    item = training_slice(random_tokens(decoder, 17))
    for feedforward in [(), (target,)] if target in INPUT_SCALED else [()]:
        spec = LoraSpec(method="ia3", target_modules=(target,), feedforward_modules=feedforward)
        adapter = random_ia3(decoder, spec, layers=(1,))
        _, grads = gradients.windowed_gradients(decoder, adapter, [item])
        gradients.assert_gradients_match(grads, peft_gradients(tiny_model("qwen2"), adapter, item.tokens), 1e-5)


def test_lora_and_ia3_jobs_share_units(tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model().double(), tmp_path, torch.float64)
    trained = [random_adapter(decoder, LoraSpec(rank=2)), *(random_ia3(decoder, spec, seed=3) for spec in SPECS.values())]
    trained.append(random_ia3(decoder, SPECS["inputs"], seed=4))
    items = [training_slice(random_tokens(decoder, 9 + 2 * i, seed=i)) for i in range(len(trained))]
    cache, alone, cursors = new_cache(decoder), [], []
    for number, (adapter, item) in enumerate(zip(trained, items, strict=True)):
        alone.append(gradients.windowed_gradients(decoder, adapter, [item])[1])
        sequence = training_sequence(item, decoder, adapter)
        slots = range(20 * number, 20 * number + len(item.tokens))
        forward_sequence(decoder, cache, sequence, adapter, [4, 3], slots)
        grads = LoraWeights(adapter.spec, decoder.config, dtype=torch.float64)
        cursors.append(BackwardCursor(decoder, adapter, grads, sequence))
    while not all(cursor.is_done for cursor in cursors):
        advance(decoder, cache, cursors, 50)
    for cursor, expected in zip(cursors, alone, strict=True):
        assert_close_in_norm(cursor.grads.flat, expected.flat, 1e-9)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_bytes_planned_are_bytes_allocated(spec: LoraSpec, layers: tuple[int, ...], share: float, tmp_path: Path) -> None:
    decoder = as_decoder(tiny_model(), tmp_path)
    adapter, item = random_ia3(decoder, spec, layers=layers), training_slice(random_tokens(decoder, 11))
    config = {
        "peft_type": "IA3", "target_modules": list(spec.target_modules), "feedforward_modules": list(spec.feedforward_modules),
        "layers_to_transform": list(layers),
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


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"feedforward_modules": ("down_proj",), "method": "lora"}, "method ia3"),
        ({"feedforward_modules": ("o_proj",)}, "among target_modules; o_proj"),
        ({"feedforward_modules": ("k_proj",)}, "may be o_proj, down_proj, not k_proj"),
        ({"target_modules": ()}, "target_modules must be some of"),
    ],
)
def test_impossible_specifications_are_refused_by_field(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidAdapterError, match=reason):
        check_spec(LoraSpec(**({"method": "ia3", "target_modules": ("k_proj", "down_proj")} | settings)))
