"""GGUF files as llama.cpp's converter writes them, converted and run: the logits are those of the model that was written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from services.cli.convert import convert
from services.cli.gguf_extras import LLAMA3, llama3_factors
from services.cli.models import ModelError
from services.executor.batch import Segment, build_batch
from services.executor.loader import load_decoder
from tests.helpers import CPU, new_cache, tiny_model
from tests.tiny import SHAPE, random_prompt

WORDS = [*map(chr, range(33, 123)), "ab", "cd", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of modules, in Hugging Face's files and in GGUF's; a layer's come behind `model.layers.N.` and `blk.N.`."""


def make_model(family: str, **overrides: Any) -> Any:
    """A tiny random model whose weights bfloat16 holds exactly, so that conversion loses nothing."""
    model = tiny_model(family, **(SHAPE | {"tie_word_embeddings": False} | overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


def write_gguf(path: Path, model: Any, architecture: str, **extras: Any) -> Path:
    """The model as llama.cpp's converter writes it; `extras` are keys behind the architecture's name."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    for key, value in extras.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{architecture}.{key.replace('__', '.')}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_types([gguf.TokenType.CONTROL if word.startswith("<") and len(word) > 1 else 1 for word in WORDS])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(WORDS.index("<s>"))
    writer.add_eos_token_id(WORDS.index("<|im_end|>"))
    for name, tensor in model.state_dict().items():
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            writer.add_tensor(*_entry(name, tensor.numpy(), architecture, config))
    if config.rope_parameters["rope_type"] == "llama3":
        factors = llama3_factors(config.rope_parameters["rope_theta"], head_dim, config.rope_parameters["factor"])
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _entry(name: str, data: Any, architecture: str, config: Any) -> tuple[str, Any]:
    """GGUF's name, and the data: of architecture llama the rows of q and k are paired as llama.cpp turns them."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}", data
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
        data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
    return f"blk.{layer}.{NAMES[part]}.{kind}", np.ascontiguousarray(data)


def our_logits(folder: Path, tokens: tuple[int, ...]) -> torch.Tensor:
    """Of every row, by the executor's loader and forward pass."""
    decoder, rows = load_decoder(folder, torch.float32, CPU), range(len(tokens))
    batch = build_batch([Segment(tokens=tokens, positions=rows, context_slots=(), slots=rows, wants_logits="all")], CPU)
    with torch.inference_mode():
        return decoder.logits(decoder.forward(batch, new_cache(decoder)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEDDLE_CACHE_DIR", str(tmp_path / "cache"))


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **LLAMA3}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "architecture", "overrides", "extras"),
    [
        ("llama", "llama", {}, {}),
        ("llama", "llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}, {}),
        ("llama", "llama", {"rope_parameters": LINEAR}, {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}),
        ("mistral", "llama", {"num_key_value_heads": 4, "sliding_window": None}, {}),
        ("qwen2", "qwen2", {"tie_word_embeddings": True}, {}),
        ("qwen3", "qwen3", {"head_dim": 128}, {}),
    ],
)
def test_a_converted_file_is_the_model_that_was_written(
    tmp_path: Path, family: str, architecture: str, overrides: dict[str, Any], extras: dict[str, Any]
) -> None:
    model = make_model(family, **overrides)
    path = write_gguf(tmp_path / "tiny.gguf", model, architecture, **extras)
    tokens = random_prompt(70)
    ours = our_logits(convert(str(path)), tokens)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True)
    )
    with torch.inference_mode():
        theirs = loaded(torch.tensor([tokens])).logits[0]
    if "rope_parameters" in overrides:
        assert not torch.allclose(theirs, expected, rtol=1e-2, atol=1e-2), "transformers does not read scaled positions"
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "extras", "reason"),
    [
        ("llama", {"rope__scaling__type": "yarn"}, r"llama\.rope\.scaling\.type yarn is not supported"),
        ("command-r", {}, r"cannot be converted: .*command-r"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_what_they_ask_for(
    tmp_path: Path, architecture: str, extras: dict[str, Any], reason: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), architecture, **extras)
    with pytest.raises(ModelError, match=reason):
        convert(str(path))


def test_tensors_that_are_missing_or_have_no_place_are_refused(tmp_path: Path) -> None:
    """transformers would draw the former at random and leave the latter out."""
    biased = write_gguf(tmp_path / "biased.gguf", make_model("qwen2"), "llama")
    with pytest.raises(ModelError, match=r"has 27 tensors, transformers reads 21 of them for LlamaForCausalLM.*attn_k\.bias"):
        convert(str(biased))
    bare = write_gguf(tmp_path / "bare.gguf", make_model("llama"), "qwen2")
    with pytest.raises(ModelError, match=r"lacks 6 tensors of a Qwen2ForCausalLM: model\.layers\.0\.self_attn\.k_proj\.bias"):
        convert(str(bare))
    heads = write_gguf(tmp_path / "heads.gguf", make_model("qwen3", head_dim=16), "qwen3")
    with pytest.raises(ModelError, match=r"heads\.gguf cannot be converted: "):
        convert(str(heads))


def test_other_factors_of_positions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "llama3_factors", lambda theta, dim, factor: np.linspace(1, factor, dim // 2))
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama", rope_parameters=LLAMA3_ROPE), "llama")
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is not Llama 3's"):
        convert(str(path))


def test_a_hub_name_without_a_network_is_one_clear_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "services.cli.convert", "owner/no-such-model"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 1
    expected = "heddle: owner/no-such-model is not in the hub's cache on this machine, and HF_HUB_OFFLINE is set\n"
    assert result.stderr == expected
