"""What a Hugging Face folder's config.json says of a decoder, and which of it we can run. Knows no weights."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any


class UnsupportedModelError(ValueError):
    """The model's configuration asks for something this executor cannot run; the message names the field."""


ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of a pre-norm decoder with rotary positions and a gated MLP (the Llama family)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    torch_dtype: str

    @property
    def attention_scale(self) -> float:
        """Factor on query-key products."""
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output features of the q, k and v parts of the fused projection."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim


def read_model_config(folder: Path) -> ModelConfig:
    """The configuration of the model in `folder`.

    Raises UnsupportedModelError for a missing, unreadable or unsupported config.json, naming the field.
    """
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path} is not a readable model configuration: {error}") from error
    _check_supported(raw)
    try:
        num_heads = int(raw["num_attention_heads"])
        hidden_size = int(raw["hidden_size"])
        return ModelConfig(
            hidden_size=hidden_size,
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
            head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
            intermediate_size=int(raw["intermediate_size"]),
            vocab_size=int(raw["vocab_size"]),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(_rope(raw).get("rope_theta") or raw.get("rope_theta") or 10000.0),
            max_position_embeddings=int(raw["max_position_embeddings"]),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            eos_token_ids=_eos_token_ids(folder, raw),
            torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        )
    except KeyError as error:
        raise UnsupportedModelError(f"{path} lacks the field {error}") from error


def _check_supported(raw: dict[str, Any]) -> None:
    architecture = (raw.get("architectures") or ["(none)"])[0]
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(f"architectures: {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act: {raw['hidden_act']} is not supported, only silu")
    if raw.get("mlp_bias") or (raw.get("attention_bias") and architecture != "Qwen2ForCausalLM"):
        raise UnsupportedModelError("attention_bias and mlp_bias are not supported")
    if (rope_type := _rope(raw).get("rope_type", _rope(raw).get("type", "default"))) != "default":
        raise UnsupportedModelError(f"rope_scaling: rope type {rope_type} is not supported")
    uses_window = raw.get("use_sliding_window", architecture == "MistralForCausalLM")
    if uses_window and raw.get("sliding_window"):
        raise UnsupportedModelError("sliding_window is not supported")


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _eos_token_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    ids: list[int] = []
    generation = folder / "generation_config.json"
    sources = [raw, json.loads(generation.read_text())] if generation.exists() else [raw]
    for source in sources:
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))
