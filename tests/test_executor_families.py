"""What config.json of each model family means: fields in old and new style, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.messages import LoraSpec
from services.executor.adapter_spec import InvalidAdapterError
from services.executor.finetune import new_job
from services.executor.loader import load_decoder
from services.executor.model_config import ModelConfig, UnsupportedModelError, read_model_config
from services.executor.rope import Llama3Bands, Rope, frequencies, rotary_tables
from tests.drafts import junk_draft, oracle_draft
from tests.helpers import CPU, new_cache, tiny_model
from tests.tiny import NUM_TOKENS, PROMPTS, SHAPE, all_requests, greedy, serve, tiny_pair

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 1024,
}
MISTRAL = BASE | {"architectures": ["MistralForCausalLM"]}
QWEN2 = BASE | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = BASE | {"architectures": ["Qwen3ForCausalLM"]}
LLAMA3_SCALING: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LLAMA3 = Rope(theta=5e5, factor=8.0, bands=Llama3Bands(low=1.0, high=4.0, original_positions=256))
FULL, SLIDING = "full_attention", "sliding_attention"


def read(folder: Path, content: dict[str, Any]) -> ModelConfig:
    """The configuration that a config.json of this content gives."""
    (folder / "config.json").write_text(json.dumps(content))
    return read_model_config(folder)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({}, Rope(theta=10000.0)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, Rope(theta=5e5, factor=2.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, Rope(theta=5e5, factor=2.0)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}}, LLAMA3),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_SCALING}}, LLAMA3),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, Rope(theta=10000.0)),
    ],
)
def test_rotary_positions_are_read_in_old_and_new_style(tmp_path: Path, fields: dict[str, Any], rope: Rope) -> None:
    assert read(tmp_path, BASE | fields).rope == rope


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_the_type_is_read_in_old_and_new_style(tmp_path: Path, field: str) -> None:
    assert read(tmp_path, BASE | {field: "bfloat16"}).torch_dtype == "bfloat16"


def test_a_folder_in_old_style_is_the_same_model(tmp_path: Path) -> None:
    model = tiny_model(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_SCALING}, **SHAPE)
    model.save_pretrained(tmp_path)
    new = load_decoder(tmp_path, torch.float32, CPU)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["rope_parameters"], content["dtype"]
    old_style = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(content | old_style))
    old = load_decoder(tmp_path, torch.float32, CPU)
    assert old.config == new.config
    assert old.config.rope.bands is not None
    assert torch.equal(old.cos_PD, new.cos_PD)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_turns_are_transformers_for_a_model_of_real_size(kind: str) -> None:
    scaling = LLAMA3_SCALING | {"original_max_position_embeddings": 8192} if kind == "llama3" else {"factor": 8.0}
    config = LlamaConfig(
        head_dim=128, max_position_embeddings=131072, rope_parameters={"rope_type": kind, "rope_theta": 5e5, **scaling}
    )
    expected, _ = ROPE_INIT_FUNCTIONS[kind](config)
    bands = Llama3Bands(low=1.0, high=4.0, original_positions=8192) if kind == "llama3" else None
    rope = Rope(theta=5e5, factor=8.0, bands=bands)
    torch.testing.assert_close(frequencies(rope, 128), expected, rtol=3e-7, atol=0.0)
    assert not torch.allclose(expected, frequencies(Rope(theta=5e5), 128))
    cos_PD, sin_PD = rotary_tables(rope, 128, 100, torch.float32, CPU)
    angles = torch.outer(torch.arange(100.0), expected).repeat(1, 2)
    torch.testing.assert_close(cos_PD, angles.cos(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sin_PD, angles.sin(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "windows"),
    [
        (BASE | {"sliding_window": 32}, (None,) * 4),
        (BASE | {"layer_types": [FULL] * 4}, (None,) * 4),
        (MISTRAL | {"sliding_window": None}, (None,) * 4),
        (MISTRAL | {"sliding_window": 32}, (32,) * 4),
        (MISTRAL | {"sliding_window": 1024}, (None,) * 4),
        (MISTRAL | {"max_position_embeddings": 8192}, (4096,) * 4),
        (MISTRAL | {"sliding_window": 32, "layer_types": [SLIDING] * 4}, (32,) * 4),
        (QWEN2 | {"sliding_window": 32}, (None,) * 4),
        (QWEN2 | {"sliding_window": 32, "use_sliding_window": True}, (None,) * 4),
        (QWEN2 | {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}, (32,) * 4),
        (QWEN2 | {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 32)),
        (QWEN2 | {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (None,) * 4),
        (QWEN3 | {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 32)),
        (
            QWEN3 | {"sliding_window": 32, "use_sliding_window": True, "layer_types": [FULL, SLIDING] * 2},
            (None, 32, None, 32),
        ),
    ],
)
def test_each_layer_has_the_window_that_transformers_gives_it(
    tmp_path: Path, content: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert read(tmp_path, content).windows == windows


def test_families_differ_where_the_configuration_is_silent(tmp_path: Path) -> None:
    parts = {name: read(tmp_path, content) for name, content in (("llama", BASE), ("qwen2", QWEN2), ("qwen3", QWEN3))}
    assert {name: (c.qkv_bias, c.o_bias, c.qk_norm, c.head_dim) for name, c in parts.items()} == {
        "llama": (False, False, False, 16),
        "qwen2": (True, False, False, 16),
        "qwen3": (False, False, True, 128),
    }
    biased = read(tmp_path, QWEN3 | {"attention_bias": True})
    assert (biased.qkv_bias, biased.o_bias) == (True, True)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "proportional", "mrope", "su"])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_other_rope_types_are_refused_by_name(tmp_path: Path, field: str, kind: str) -> None:
    for key in ("type", "rope_type"):
        with pytest.raises(UnsupportedModelError, match=f"{field}: rope type {kind}"):
            read(tmp_path, BASE | {field: {key: kind, "factor": 2.0}})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (BASE | {"architectures": ["MixtralForCausalLM"]}, "architectures: MixtralForCausalLM"),
        (BASE | {"architectures": ["Qwen3MoeForCausalLM"]}, "architectures: Qwen3MoeForCausalLM"),
        (BASE | {"num_experts": 8}, "num_experts: 8"),
        (BASE | {"num_local_experts": 8}, "num_local_experts: 8"),
        (BASE | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (BASE | {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        (BASE | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (BASE | {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (BASE | {"use_mrope": True}, "use_mrope"),
        (BASE | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (BASE | {"rope_scaling": {"type": "default", "mrope_section": [1, 1]}}, "mrope_section"),
        (BASE | {"rope_parameters": {FULL: {"rope_type": "default"}}}, FULL),
        (BASE | {"rope_parameters": {"rope_type": "linear", "attention_factor": 1.5, "factor": 2}}, "attention_factor"),
        (BASE | {"rope_parameters": 7}, "rope_parameters: 7"),
        (BASE | {"rope_scaling": "linear"}, "rope_scaling: 'linear'"),
        (BASE | {"rope_scaling": {"type": "linear"}}, "factor"),
        (BASE | {"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor"),
        (BASE | {"rope_scaling": {"type": "llama3", **LLAMA3_SCALING, "high_freq_factor": 1.0}}, "high_freq_factor"),
        (BASE | {"rope_scaling": {"type": "llama3", **LLAMA3_SCALING, "low_freq_factor": None}}, "low_freq_factor"),
        (BASE | {"rope_theta": float("inf")}, "rope_theta"),
        (BASE | {"head_dim": 15}, "head_dim"),
        (MISTRAL | {"attention_bias": True}, "attention_bias"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window"),
        (MISTRAL | {"sliding_window": 32, "layer_types": [FULL, SLIDING] * 2}, "layer_types"),
        (MISTRAL | {"sliding_window": None, "layer_types": [SLIDING] * 4}, "layer_types"),
        (BASE | {"layer_types": [FULL, SLIDING] * 2}, "layer_types"),
        (BASE | {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN2 | {"layer_types": [SLIDING] * 4}, "layer_types"),
        (QWEN2 | {"layer_types": [FULL] * 3}, "layer_types"),
        (QWEN2 | {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        (QWEN2 | {"layer_types": [[]] * 4}, "layer_types"),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
    ],
)
def test_what_no_family_here_can_do_is_refused_by_field(tmp_path: Path, content: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read(tmp_path, content)


def test_the_base_of_these_contents_is_a_model(tmp_path: Path) -> None:
    for content in (BASE, MISTRAL, QWEN2, QWEN3):
        assert read(tmp_path, content).num_layers == 4


WINDOWED: dict[str, Any] = {"family": "mistral", "sliding_window": 6}
NORMED: dict[str, Any] = {"family": "qwen3", "head_dim": 8}


@pytest.mark.parametrize("options", [WINDOWED, NORMED], ids=["mistral", "qwen3"])
def test_an_engine_generates_what_transformers_does_with_and_without_trees(options: dict[str, Any]) -> None:
    model, decoder = tiny_pair(**options)
    truth = {name: greedy(model, prompt, NUM_TOKENS) for name, prompt in PROMPTS.items()}
    for draft in (None, oracle_draft(truth), junk_draft()):
        assert serve(decoder, *all_requests(), draft=draft).streams.tokens == truth


@pytest.mark.parametrize(
    ("options", "part"),
    [(WINDOWED, "sliding window attention"), (NORMED, "norms on queries and keys")],
    ids=["mistral", "qwen3"],
)
def test_models_without_a_backward_pass_take_no_jobs(options: dict[str, Any], part: str) -> None:
    _, decoder = tiny_pair(**options)
    with pytest.raises(InvalidAdapterError, match=f"cannot be finetuned yet: its {part}"):
        new_job("job", LoraSpec(rank=2), 0, decoder, new_cache(decoder))


def test_a_mistral_without_a_window_takes_jobs() -> None:
    _, decoder = tiny_pair("mistral", sliding_window=None)
    assert new_job("job", LoraSpec(rank=2), 0, decoder, new_cache(decoder)).step == 0
