"""A trained drafter as a folder's files: config.json and safetensors. Knows no training and no model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from kernels.drafting.head import DraftHead

CONFIG, WEIGHTS, CARD = "config.json", "drafter.safetensors", "README.md"
FORMAT = "heddle-features-1"


def write_drafter(folder: Path, head: DraftHead, vocabulary: Sequence[int], *, fingerprint: str, max_depth: int) -> None:
    """Write what a planner reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = drafter_config(head, fingerprint=fingerprint, max_depth=max_depth)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / WEIGHTS).write_bytes(drafter_weights(head, vocabulary))


def drafter_config(head: DraftHead, *, fingerprint: str, max_depth: int) -> dict[str, Any]:
    """What config.json says."""
    return {"format": FORMAT, "fingerprint": fingerprint, "max_depth": max_depth} | dataclasses.asdict(head.shape)


def drafter_weights(head: DraftHead, vocabulary: Sequence[int], metadata: dict[str, str] | None = None) -> bytes:
    """The weights as safetensors bytes. Matrices become int8 with a scale per row, so that the folder is small."""
    tensors = {"vocabulary_V": torch.tensor(vocabulary, dtype=torch.int32)}
    for name, value in head.state_dict().items():
        if name == "head_VH" and torch.equal(value, head.embedding_VH):
            continue  # tied
        if value.ndim == 2:
            tensors[name], tensors[f"{name}_scale"] = quantized(value)
        else:
            tensors[name] = value.contiguous()
    return safetensors.torch.save(tensors, metadata=metadata or {"format": "pt"})


def quantized(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 [O, I] and the scale [O] that it is multiplied by."""
    scale_O = (weight_OI.abs().amax(dim=1) / 127).clamp(min=1e-12)
    return (weight_OI / scale_O[:, None]).round().to(torch.int8), scale_O
