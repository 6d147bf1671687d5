"""The packed linear against torch in a wider type, and its plain weight untouched."""

from __future__ import annotations

import pytest
import torch

from kernels.ops import Linear
from tests.helpers import assert_matches, randn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 16, 17, 300])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(dtype: torch.dtype, num_rows: int, has_bias: bool) -> None:
    weight, bias = randn(40, 24, dtype=dtype, seed=1) / 24**0.5, randn(40, dtype=dtype, seed=2)
    narrow = weight.to(dtype)
    x = randn(num_rows, 24, dtype=dtype)
    linear = Linear(narrow, bias.to(dtype) if has_bias else None)
    expected = x @ narrow.double().T + (bias if has_bias else 0.0)
    before = narrow.clone()
    assert_matches(linear(x.to(dtype)), expected)
    assert torch.equal(narrow, before)
