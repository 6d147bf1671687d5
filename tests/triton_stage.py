"""Where the Triton tests run: on a GPU if there is one, else in the interpreter (conftest). Imported before any kernel."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU that torch does not see, and no TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
BF16 = pytest.param(
    torch.bfloat16,
    marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="the interpreter multiplies bf16 bit patterns in tl.dot")],
)
DTYPES = [torch.float32, torch.float16, BF16]


def put(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in this type where the kernels run."""
    return x.to(device=DEVICE, dtype=dtype, copy=True)
