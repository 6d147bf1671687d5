"""The window gradients of attention in Triton against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

import tests.triton_stage as stage
from kernels import reference
from kernels.triton_ops import window_attention_backward as module
from kernels.triton_ops.window_attention_backward import window_attention_backward
from tests.helpers import assert_matches, randn

SCALE = 0.3


@pytest.mark.parametrize("dtype", stage.DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 8), (3, 1, 24), (2, 2, 16)])
@pytest.mark.parametrize(("start", "num_rows"), [(0, 1), (0, 11), (4, 1), (16, 16), (15, 17), (33, 5)])
def test_window_attention_backward(
    start: int,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    do, q = (randn(num_rows, num_heads, head_dim, dtype=dtype, seed=seed) / 2 for seed in (0, 1))
    k, v = (randn(start + num_rows, num_kv_heads, head_dim, dtype=dtype, seed=seed) / 2 for seed in (2, 3))
    expected = reference.window_attention_backward(do, q, k, v, start, SCALE)
    narrow_do, narrow_q, narrow_k, narrow_v = (stage.put(x, dtype) for x in (do, q, k, v))
    actual = window_attention_backward(narrow_do, narrow_q, narrow_k, narrow_v, start, SCALE)
    for found, wanted in zip(actual, expected, strict=True):
        assert_matches(found.cpu(), wanted)


def test_keys_of_another_window_are_refused() -> None:
    q, k = stage.put(randn(3, 2, 4), torch.float32), stage.put(randn(5, 2, 4), torch.float32)
    with pytest.raises(ValueError, match="5 keys for a window of 3 rows that starts at 1"):
        window_attention_backward(q, q, k, k, 1, 1.0)


def test_a_window_of_no_rows_has_no_gradients() -> None:
    q, k = stage.put(randn(0, 2, 4), torch.float32), stage.put(randn(5, 2, 4), torch.float32)
    o, dq, dk, dv = window_attention_backward(q, q, k, k, 5, 1.0)
    assert o.shape == dq.shape == q.shape
    assert dk.shape == dv.shape == k.shape
    assert not torch.cat((dk, dv)).any()
