"""A trained drafter as a folder: config.json, safetensors, and its card. Knows files, no training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from services.cli.distill_head import DraftHead

CONFIG, WEIGHTS, CARD = "config.json", "drafter.safetensors", "README.md"
FORMAT = "heddle-features-1"


def write_drafter(folder: Path, head: DraftHead, vocabulary: Sequence[int], *, fingerprint: str, max_depth: int) -> None:
    """Write what a planner reads. Matrices become int8 with a scale per row, so that the folder is small."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "fingerprint": fingerprint, "max_depth": max_depth} | dataclasses.asdict(head.shape)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {"vocabulary_V": torch.tensor(vocabulary, dtype=torch.int32)}
    for name, value in head.state_dict().items():
        if name == "head_VH" and torch.equal(value, head.embedding_VH):
            continue  # tied
        if value.ndim == 2:
            tensors[name], tensors[f"{name}_scale"] = quantized(value)
        else:
            tensors[name] = value.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def quantized(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 [O, I] and the scale [O] that it is multiplied by."""
    scale_O = (weight_OI.abs().amax(dim=1) / 127).clamp(min=1e-12)
    return (weight_OI / scale_O[:, None]).round().to(torch.int8), scale_O
