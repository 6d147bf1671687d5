"""Which model a folder holds, told by its norms: a drafter that was trained for a model finds it again. Knows no architecture.

Norms are kept in full precision when a model is quantized, and differ between its finetuned versions.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.model_folder import ModelFolderError, read_json_object

NUMPY_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
MAX_HEADER_BYTES = 100_000_000


def fingerprint(folder: Path) -> str:
    """16 hex digits; the same for all precisions of the same model with the same vocabulary. Raises ModelFolderError."""
    digest = hashlib.sha256(str(read_json_object(folder / "config.json").get("vocab_size")).encode())
    norms = dict(norm for path in sorted(folder.glob("*.safetensors")) for norm in _norms(path))
    if not norms:
        raise ModelFolderError(f"{folder} has no safetensors with norms")
    for name in sorted(norms):
        digest.update(name.encode() + norms[name])
    return digest.hexdigest()[:16]


def _norms(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and value, as the upper halves of float32, of all vectors whose name has "norm" in it."""
    try:
        with path.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(header_size, MAX_HEADER_BYTES)))
            for name, entry in header.items():
                if "norm" in name and len(entry["shape"]) == 1:
                    start, end = entry["data_offsets"]
                    file.seek(8 + header_size + start)
                    yield name, _halves(file.read(end - start), entry["dtype"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelFolderError(f"{path} is not a readable safetensors file: {error}") from error


def _halves(data: bytes, dtype: str) -> bytes:
    if dtype == "BF16":
        return data
    values: Any = np.frombuffer(data, NUMPY_TYPES[dtype]).astype(np.float32).view(np.uint32)
    rounded = values + 0x7FFF + ((values >> 16) & 1)  # to nearest, ties to even, as bfloat16 is rounded everywhere
    halves: bytes = (rounded >> 16).astype(np.uint16).tobytes()
    return halves
