"""What a GGUF file says that transformers does not read: how numbers are split, how positions are scaled. Knows no weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from services.cli.models import ModelError

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""All Llama 3.1, 3.2 and 3.3 models scale with these; GGUF files carry only the factors that come of it."""


def restore_pre_tokenizer(tokenizer: Any, path: Path) -> None:
    """Models of the SmolLM family split numbers into digits before merging (`tokenizer.ggml.pre`).

    Without it 35 of HumanEval's 164 problems get other tokens than the model was trained on.
    """
    if _value(gguf.GGUFReader(path), "tokenizer.ggml.pre") == "smollm":
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)


def restore_rope(config: Any, path: Path) -> None:
    """Write the scaling of rotary positions into a transformers configuration, which has been read without it.

    Raises ModelError for a kind of scaling that is neither linear nor Llama 3's.
    """
    reader = gguf.GGUFReader(path)
    prefix = f"{_value(reader, 'general.architecture')}.rope.scaling"
    kind = _value(reader, f"{prefix}.type") or "none"
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if kind not in ("none", "linear") or (kind == "linear" and factors is not None):
        raise ModelError(f"{path}: {prefix}.type {kind} is not supported")
    theta = float(config.rope_parameters["rope_theta"])
    if kind == "linear":
        factor = _value(reader, f"{prefix}.factor")
        config.rope_parameters = {"rope_type": "linear", "rope_theta": theta, "factor": float(factor or 1.0)}
    if factors is not None:
        factor = float(np.max(factors))
        if not np.allclose(factors, llama3_factors(theta, 2 * len(factors), factor), rtol=1e-3):
            raise ModelError(f"{path}: rope_freqs.weight is not Llama 3's scaling of positions, the only one that is supported")
        config.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3}


def check_all_read(model: Any, path: Path) -> None:
    """Raises ModelError for a file with more tensors than its transformers model: it has left some out, and said nothing."""
    names = [tensor.name for tensor in gguf.GGUFReader(path).tensors if not tensor.name.startswith("rope_")]
    num_read = len(model.state_dict()) - bool(model.config.tie_word_embeddings)
    if len(names) > num_read:
        kinds = sorted({name.rpartition("blk.")[2].lstrip("0123456789.") for name in names})
        raise ModelError(
            f"{path} has {len(names)} tensors, transformers reads {num_read} of them for {type(model).__name__}; "
            f"it has {', '.join(kinds)}"
        )


def llama3_factors(theta: float, head_dim: int, factor: float) -> Any:
    """What the wavelength of each pair of dimensions is stretched by [head_dim / 2]: short ones not at all, long ones by
    `factor`, in between (by turns in the original context) smoothly.
    """
    turns = LLAMA3["original_max_position_embeddings"] / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()
