"""The sizes of a decoder as config.json tells them. Knows neither weights nor what any executor can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.model_folder import ModelFolderError, read_json_object

HEAD_DIMS = {"Qwen3ForCausalLM": 128}
"""Sizes of a head that do not follow from the hidden size, by architecture; config.json may say another."""
WITH_HEAD_NORMS = ("Qwen3ForCausalLM",)
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a pre-norm decoder with a gated MLP; `has_head_norms` if each head's query and key are normed before RoPE."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    has_head_norms: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Input and output features of a layer's linears, in the order in which they run."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (hidden, q),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (q, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }


def shape_of(raw: Mapping[str, Any]) -> ModelShape:
    """The sizes in the object of a config.json. Raises ModelFolderError, naming the field."""
    names = raw.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    num_heads, hidden_size = positive_count(raw, "num_attention_heads"), positive_count(raw, "hidden_size")
    num_kv_heads = positive_count(raw, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelFolderError(f"num_key_value_heads: {num_kv_heads} does not divide {num_heads} heads")
    return ModelShape(
        hidden_size=hidden_size,
        num_layers=positive_count(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=positive_count(raw, "head_dim", HEAD_DIMS.get(architecture, hidden_size // num_heads)),
        intermediate_size=positive_count(raw, "intermediate_size"),
        vocab_size=positive_count(raw, "vocab_size"),
        has_head_norms=architecture in WITH_HEAD_NORMS,
    )


def read_model_shape(folder: Path) -> tuple[ModelShape, str]:
    """The sizes of the model in `folder`, which may hold config.json alone, and its dtype. Raises ModelFolderError."""
    path = folder / "config.json"
    raw = read_json_object(path)
    if not raw:
        raise ModelFolderError(f"{path} is missing or empty")
    try:
        return shape_of(raw), str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    except ModelFolderError as error:
        raise ModelFolderError(f"{path}: {error}") from error


def positive_count(raw: Mapping[str, Any], field: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number of an object, `default` where it is silent. Raises ModelFolderError, naming the field."""
    value = default if raw.get(field) is None else raw[field]
    if type(value) is not int or value < least:
        raise ModelFolderError(f"{field}: a whole number of at least {least} is needed, not {value!r}")
    return value
