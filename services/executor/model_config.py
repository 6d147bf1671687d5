"""What a Hugging Face folder's config.json says of a decoder, and which of it we can run. Knows no weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from common.model_folder import ModelFolderError, end_token_ids, read_json_object
from common.model_shape import ModelShape, positive_count, shape_of
from services.executor.rope import Llama3Bands, Rope


class UnsupportedModelError(ModelFolderError):
    """The model's folder is damaged or asks for something this executor cannot run; the message names the file or the field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """What an architecture's name says by itself, and which fields it obeys.

    `windowed` are the layers that `sliding_window` means: none, all, or the upper ones if `use_sliding_window` is set.
    """

    qkv_bias: bool = False
    obeys_attention_bias: bool = False
    qk_norm: bool = False
    windowed: str = "none"


FAMILIES = {
    "LlamaForCausalLM": _Family(obeys_attention_bias=True),
    "MistralForCausalLM": _Family(windowed="all"),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, windowed="upper"),
    "Qwen3ForCausalLM": _Family(obeys_attention_bias=True, qk_norm=True, windowed="upper"),
}
NEUTRAL: dict[str, object] = {
    "hidden_act": "silu",
    "mlp_bias": None,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "num_experts": None,
    "num_local_experts": None,
    "n_routed_experts": None,
    "no_rope_layers": None,
    "use_mrope": None,
}
"""Fields that change what a decoder computes, and the only value (beside none and false) that we can run."""
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What each type of rotary positions is told, beside its type and theta."""
DEFAULT_WINDOW, DEFAULT_MAX_WINDOW_LAYERS = 4096, 28
"""What the families take where config.json is silent."""
FULL, SLIDING = "full_attention", "sliding_attention"


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
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    torch_dtype: str
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    """Each head's query and key are normed before RoPE."""
    windows: tuple[int | None, ...]
    """Per layer: a row sees keys less than this many positions away; None is all of them."""

    @property
    def attention_scale(self) -> float:
        """Factor on query-key products."""
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output features of the q, k and v parts of the fused projection."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim

    @property
    def shape(self) -> ModelShape:
        """The sizes alone."""
        return ModelShape(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            has_head_norms=self.qk_norm,
        )

    @property
    def untrainable_part(self) -> str | None:
        """What the backward pass does not know; None if the model can be finetuned."""
        if self.qk_norm:
            return "norms on queries and keys"
        return None if all(window is None for window in self.windows) else "sliding window attention"


def read_model_config(folder: Path) -> ModelConfig:
    """The configuration of the model in `folder`.

    Raises UnsupportedModelError for a missing, unreadable or unsupported config.json, naming the field.
    """
    raw = _read_object(folder / "config.json")
    family = _family(raw)
    try:
        shape = shape_of(raw)
    except ModelFolderError as error:
        raise UnsupportedModelError(str(error)) from error
    if shape.head_dim % 2:
        raise UnsupportedModelError(f"head_dim: an even number is needed, not {shape.head_dim}")
    max_positions = _count(raw, "max_position_embeddings")
    has_bias = family.obeys_attention_bias and bool(raw.get("attention_bias"))
    return ModelConfig(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=_end_token_ids(folder),
        torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        qkv_bias=family.qkv_bias or has_bias,
        o_bias=has_bias,
        qk_norm=family.qk_norm,
        windows=_windows(raw, family, shape.num_layers, max_positions),
    )


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UnsupportedModelError(f"{path} is missing: {path.parent} is no Hugging Face model folder")
    try:
        return read_json_object(path)
    except ModelFolderError as error:
        raise UnsupportedModelError(str(error)) from error


def _count(raw: dict[str, Any], field: str, default: int | None = None, *, least: int = 1) -> int:
    try:
        return positive_count(raw, field, default, least=least)
    except ModelFolderError as error:
        raise UnsupportedModelError(str(error)) from error


def _positive(raw: dict[str, Any], field: str, default: float | None = None) -> float:
    value = default if raw.get(field) is None else raw[field]
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UnsupportedModelError(f"{field}: a positive number is needed, not {value!r}")
    return float(value)


def _family(raw: dict[str, Any]) -> _Family:
    """The architecture's family. Raises UnsupportedModelError if it, or a field that no family obeys, asks for more."""
    names = raw.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else "(none)"
    if architecture not in FAMILIES:
        raise UnsupportedModelError(f"architectures: {architecture} is not supported; supported: {', '.join(FAMILIES)}")
    for field, neutral in NEUTRAL.items():
        if (value := raw.get(field)) not in (None, False, neutral):
            raise UnsupportedModelError(f"{field}: {value} is not supported")
    family = FAMILIES[architecture]
    if raw.get("attention_bias") and not (family.obeys_attention_bias or family.qkv_bias):
        raise UnsupportedModelError(f"attention_bias: {architecture} has none")
    return family


def _rope(raw: dict[str, Any], max_positions: int) -> Rope:
    """From `rope_scaling` and `rope_theta` as older files have them, or from `rope_parameters`."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    told = raw.get(name) or {}
    if not isinstance(told, dict):
        raise UnsupportedModelError(f"{name}: {told!r} is no JSON object")
    kind = str(told.get("rope_type") or told.get("type") or "default")
    if kind not in ROPE_FIELDS:
        raise UnsupportedModelError(f"{name}: rope type {kind} is not supported; supported: {', '.join(ROPE_FIELDS)}")
    for field, value in told.items():
        is_known = field in ("rope_type", "type", "rope_theta", *ROPE_FIELDS[kind])
        if not is_known and value not in (None, False, NEUTRAL.get(field)):
            raise UnsupportedModelError(f"{name}: {field} is not supported for rope type {kind}")
    theta = _positive(told, "rope_theta", _positive(raw, "rope_theta", 10000.0))
    if kind == "default":
        return Rope(theta=theta)
    return Rope(
        theta=theta, factor=_positive(told, "factor"), bands=_bands(raw, told, max_positions) if kind == "llama3" else None
    )


def _bands(raw: dict[str, Any], told: dict[str, Any], max_positions: int) -> Llama3Bands:
    low, high = _positive(told, "low_freq_factor"), _positive(told, "high_freq_factor")
    if low >= high:
        raise UnsupportedModelError(f"high_freq_factor: {high} is not above low_freq_factor {low}")
    field = "original_max_position_embeddings"
    return Llama3Bands(low=low, high=high, original_positions=_count(raw, field, _count(told, field, max_positions)))


def _windows(raw: dict[str, Any], family: _Family, num_layers: int, max_positions: int) -> tuple[int | None, ...]:
    """Windows as wide as the longest sequence are none."""
    window = _window(raw, family)
    first = 0 if family.windowed == "all" else _count(raw, "max_window_layers", DEFAULT_MAX_WINDOW_LAYERS, least=0)
    usual = [SLIDING if window is not None and layer >= first else FULL for layer in range(num_layers)]
    types = usual if raw.get("layer_types") is None else raw["layer_types"]
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise UnsupportedModelError(f"layer_types: {num_layers} of {FULL}, {SLIDING} are needed, not {types!r}")
    if types != usual and (family.windowed != "upper" or window is None):
        raise UnsupportedModelError(f"layer_types: {types!r} does not fit sliding_window {window}")
    return tuple(None if window is None or window >= max_positions or kind == FULL else window for kind in types)


def _window(raw: dict[str, Any], family: _Family) -> int | None:
    uses_window = family.windowed == "all" or bool(raw.get("use_sliding_window"))
    if uses_window and family.windowed == "none":
        raise UnsupportedModelError("use_sliding_window: this architecture has no sliding window")
    if not uses_window or raw.get("sliding_window", DEFAULT_WINDOW) is None:
        return None
    return _count(raw, "sliding_window", DEFAULT_WINDOW)


def _end_token_ids(folder: Path) -> tuple[int, ...]:
    try:
        return end_token_ids(folder)
    except ModelFolderError as error:
        raise UnsupportedModelError(str(error)) from error
