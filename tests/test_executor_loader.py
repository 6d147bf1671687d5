"""Model folders: what loads, and that whatever cannot be loaded is one typed error that names the cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from common.chat import ChatTokenizer
from common.model_folder import ModelFolderError
from services.executor.batch import Segment, build_batch
from services.executor.loader import choose_dtype, load_decoder
from services.executor.model import Decoder
from services.executor.model_config import UnsupportedModelError, read_model_config
from tests.helpers import CPU, as_decoder, new_cache, tiny_model
from tests.tiny import SHAPE, random_prompt
from tests.trainer_fakes import write_model_dir


def assert_loads_as(decoder: Decoder, model: Any) -> None:
    tokens = random_prompt(11)
    rows = range(11)
    batch = build_batch([Segment(tokens=tokens, positions=rows, context_slots=(), slots=rows, wants_logits="all")], CPU)
    with torch.inference_mode():
        logits = decoder.logits(decoder.forward(batch, new_cache(decoder)))
        expected = model(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model."""
    tiny_model(**SHAPE).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | fields))


def test_sharded_safetensors(tmp_path: Path) -> None:
    model = tiny_model(**SHAPE)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_loads_as(load_decoder(tmp_path, torch.float32, CPU), model)


def test_half_precision_checkpoints_are_widened(tmp_path: Path) -> None:
    model = tiny_model(**SHAPE).bfloat16()
    decoder = as_decoder(model, tmp_path, torch.float32)
    assert decoder.dtype == torch.float32
    assert read_model_config(tmp_path).torch_dtype == "bfloat16"
    assert_loads_as(decoder, type(model).from_pretrained(tmp_path, dtype=torch.float32))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures: GPT2LMHeadModel"),
        ({"architectures": []}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"vocab_size": [97]}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_configurations_that_cannot_run_are_refused_by_field(folder: Path, fields: dict[str, Any], named: str) -> None:
    edit(folder / "config.json", **fields)
    with pytest.raises(UnsupportedModelError, match=named):
        load_decoder(folder, torch.float32, CPU)


@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ],
)
def test_a_missing_field_is_named(folder: Path, field: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    del content[field]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match=field):
        read_model_config(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"config"'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_unreadable_json_is_refused_by_file(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UnsupportedModelError, match=name):
        read_model_config(folder)


def test_missing_files_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=r"no model\.safetensors"):
        load_decoder(folder, torch.float32, CPU)
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        load_decoder(tmp_path / "nowhere", torch.float32, CPU)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]"])
def test_an_unreadable_index_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match="index"):
        load_decoder(folder, torch.float32, CPU)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_model(**SHAPE).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UnsupportedModelError, match=shard.name):
        load_decoder(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors is not a readable"):
        load_decoder(folder, torch.float32, CPU)


@pytest.mark.parametrize(
    ("fields", "tensor"),
    [
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is missing"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight is missing"),
        ({"vocab_size": 98}, r"model\.embed_tokens\.weight has shape \(97, 32\), expected \(98, 32\)"),
        ({"intermediate_size": 44}, r"gate_proj\.weight has shape \(48, 32\), expected \(44, 32\)"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ is not part of"),
        ({"attention_bias": True}, r"q_proj\.bias is missing"),
        ({"architectures": ["Qwen2ForCausalLM"]}, r"q_proj\.bias is missing"),
        ({"architectures": ["Qwen3ForCausalLM"]}, r"q_norm\.weight is missing"),
        ({"num_key_value_heads": 1}, r"k_proj\.weight has shape \(16, 32\), expected \(8, 32\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_tensor(folder: Path, fields: dict[str, Any], tensor: str) -> None:
    edit(folder / "config.json", **fields)
    with pytest.raises(UnsupportedModelError, match=tensor):
        load_decoder(folder, torch.float32, CPU)


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_weights_in_a_type_that_needs_scales_are_refused(folder: Path, stored: torch.dtype) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors.torch.save_file(tensors | {name: tensors[name].to(stored)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=rf"up_proj\.weight is stored as {str(stored).removeprefix('torch.')}"):
        load_decoder(folder, torch.float32, CPU)


def test_tensors_that_the_configuration_has_no_place_for_are_refused(tmp_path: Path) -> None:
    tiny_model("qwen3", **SHAPE).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"tensor model\.layers\.0\.self_attn\.k_norm\.weight is not part of"):
        load_decoder(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize(
    ("generation", "config", "named", "expected"),
    [
        (None, None, None, ()),
        ([5, 2], 2, None, (5, 2)),
        (None, [7, 2], "<|im_end|>", (7, 2, 259)),
        (3, 259, {"content": "<|im_end|>"}, (3, 259)),
        (None, None, "a", (64,)),
        (4, None, "of no tokenizer", (4,)),
    ],
)
def test_executor_and_gateway_know_the_same_end_tokens(
    folder: Path, generation: object, config: object, named: object, expected: tuple[int, ...]
) -> None:
    """From generation_config.json, then config.json, then the tokenizer's own."""
    write_model_dir(folder)
    edit(folder / "generation_config.json", eos_token_id=generation)
    edit(folder / "config.json", eos_token_id=config)
    edit(folder / "tokenizer_config.json", eos_token=named)
    assert ChatTokenizer.load(folder).eos_token_ids == expected
    assert read_model_config(folder).eos_token_ids == expected


@pytest.mark.parametrize("value", ["</s>", [1, "</s>"], True, 1.5])
def test_end_tokens_that_are_no_ids_are_refused_by_both(folder: Path, value: object) -> None:
    write_model_dir(folder)
    edit(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(ModelFolderError, match=r"eos_token_id.*generation_config\.json"):
        ChatTokenizer.load(folder)
    with pytest.raises(UnsupportedModelError, match=r"eos_token_id.*generation_config\.json"):
        read_model_config(folder)


def test_the_type_is_the_checkpoints_where_the_device_computes_in_it(folder: Path) -> None:
    config = read_model_config(folder)
    assert choose_dtype("auto", config, CPU) == torch.float32
    assert choose_dtype("bfloat16", config, CPU) == torch.bfloat16
    assert choose_dtype("auto", config, torch.device("cuda")) == torch.float32
    with pytest.raises(ValueError, match="float8"):
        choose_dtype("float8", config, CPU)
