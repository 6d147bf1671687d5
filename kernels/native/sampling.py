"""Drawing tokens through the compiled library, one call for all rows. Knows pointers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from kernels.native.operations import ELEMENT, check, loaded_library
from kernels.sampling import Draw

_FIELDS = ("temperature", "top_p", "min_p", "uniform")
_DRAW = np.dtype([*((name, np.float64) for name in _FIELDS), ("top_k", np.int64), ("row", np.int64)])


def draw_tokens(logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """`kernels.sampling.draw_tokens`, in float32: it parts from it where a uniform number falls on an edge, 1e-7 wide."""
    logits_RV = logits_RV.contiguous()
    table = np.array([(d.temperature, d.top_p, d.min_p, d.uniform, d.top_k, d.row) for d in draws], dtype=_DRAW)
    tokens = np.empty(len(draws), dtype=np.int64)
    arguments = (table.ctypes.data, len(draws), tokens.ctypes.data, ELEMENT[logits_RV.dtype])
    check(loaded_library().heddle_draw(logits_RV.data_ptr(), logits_RV.shape[1], *arguments))
    found: list[int] = tokens.tolist()
    return found
