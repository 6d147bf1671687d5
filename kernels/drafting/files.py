"""A trained drafter as a folder's files: config.json and safetensors. Knows no training and no model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from kernels.drafting.folder import CARD, CONFIG, FORMAT, WEIGHTS, DrafterFilesError, read_config
from kernels.drafting.head import DraftHead, HeadShape

__all__ = (
    "CARD", "CONFIG", "FORMAT", "WEIGHTS", "DrafterFilesError", "StoredDrafter", "drafter_config", "drafter_weights",
    "quantized", "read_drafter", "write_drafter",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StoredDrafter:
    """What a folder says: the head's shape, its weights in float32 by name, and the tokens that it can draft."""

    shape: HeadShape
    fingerprint: str
    max_depth: int
    weights: dict[str, Tensor]
    vocabulary: list[int]

    def head(self) -> DraftHead:
        """The head, to be trained on."""
        head = DraftHead(self.shape, self.weights["embedding_VH"])
        head.load_state_dict({"head_VH": self.weights["embedding_VH"], **self.weights})
        return head


def read_drafter(folder: Path) -> StoredDrafter:
    """Raises DrafterFilesError."""
    config = read_config(folder)
    try:
        stored = safetensors.torch.load_file(folder / WEIGHTS)
        shape = HeadShape(
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_heads=int(config["num_heads"]),
            num_kv_heads=int(config["num_kv_heads"]),
            head_dim=int(config["head_dim"]),
            feature_layers=tuple(int(layer) for layer in config["feature_layers"]),
            window=int(config["window"]),
            rope_theta=float(config["rope_theta"]),
            rms_norm_eps=float(config["rms_norm_eps"]),
        )
        names = [name for name in stored if not name.endswith(("_scale", "vocabulary_V"))]
        return StoredDrafter(
            shape=shape,
            fingerprint=str(config["fingerprint"]),
            max_depth=int(config["max_depth"]),
            weights={name: _widened(name, stored) for name in names},
            vocabulary=stored["vocabulary_V"].tolist(),
        )
    except KeyError as error:
        raise DrafterFilesError(f"{folder} is no drafter on features: it has no {error.args[0]}") from error
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise DrafterFilesError(f"{folder} is no drafter on features: {error}") from error


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


def _widened(name: str, stored: dict[str, Tensor]) -> Tensor:
    """Matrices are stored as int8 with a scale per row, or as they are."""
    scale = stored.get(f"{name}_scale")
    return stored[name].float() if scale is None else stored[name].float() * scale.float()[:, None]
