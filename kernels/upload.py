"""Tables made on the host on their way to a device: one buffer, one copy that the host does not wait for. Knows no meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT_BYTES = 64
"""Where each table begins, so that kernels may read it in wide accesses."""
_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.bool_): torch.bool,
}


def upload(tables: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The tables on the device, each with its shape and type. The host's buffer is pinned where the copy may overtake it."""
    tables = [np.ascontiguousarray(table) for table in tables]
    starts = np.cumsum([0, *(-(-table.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for table in tables)])
    host = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    bytes_of_host = host.numpy()
    for table, start in zip(tables, starts, strict=False):
        bytes_of_host[start : start + table.nbytes] = table.reshape(-1).view(np.uint8)
    moved = host.to(device, non_blocking=True)
    return [
        moved[start : start + table.nbytes].view(_TYPES[table.dtype]).view(table.shape)
        for table, start in zip(tables, starts.tolist(), strict=False)
    ]
