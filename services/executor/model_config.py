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
    raw = _read_object(folder / "config.json")
    _check_supported(raw)
    num_heads, hidden_size = _count(raw, "num_attention_heads"), _count(raw, "hidden_size")
    num_kv_heads = _count(raw, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(f"num_key_value_heads: {num_kv_heads} does not divide {num_heads} heads")
    return ModelConfig(
        hidden_size=hidden_size,
        num_layers=_count(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_count(raw, "head_dim", hidden_size // num_heads),
        intermediate_size=_count(raw, "intermediate_size"),
        vocab_size=_count(raw, "vocab_size"),
        rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
        rope_theta=_positive(_rope(raw), "rope_theta", _positive(raw, "rope_theta", 10000.0)),
        max_position_embeddings=_count(raw, "max_position_embeddings"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=_eos_token_ids(folder, raw),
        torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path} is not a readable model configuration: {error}") from error
    if not isinstance(raw, dict):
        raise UnsupportedModelError(f"{path} is not a readable model configuration: no JSON object")
    return raw


def _count(raw: dict[str, Any], field: str, default: int | None = None) -> int:
    value = default if raw.get(field) is None else raw[field]
    if type(value) is not int or value < 1:
        raise UnsupportedModelError(f"{field}: a positive whole number is needed, not {value!r}")
    return value


def _positive(raw: dict[str, Any], field: str, default: float) -> float:
    value = default if raw.get(field) is None else raw[field]
    if not isinstance(value, int | float) or not value > 0:
        raise UnsupportedModelError(f"{field}: a positive number is needed, not {value!r}")
    return float(value)


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
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UnsupportedModelError(f"rope_parameters: {rope!r} is no JSON object")
    return rope


def _eos_token_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    ids: list[int] = []
    generation = folder / "generation_config.json"
    sources = [raw, _read_object(generation)] if generation.exists() else [raw]
    for source in sources:
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise UnsupportedModelError(f"eos_token_id: {ids} are no token ids")
    return tuple(dict.fromkeys(ids))
