"""The gradients of attention in Triton against the reference in fp64: windows of all sizes, alone and in one launch."""

from __future__ import annotations

import pytest
import torch

import tests.triton_stage as stage
from kernels import reference
from kernels.segments import AttentionPlan, AttentionSegment
from kernels.triton_ops import ragged_attention_backward as module
from kernels.triton_ops.ragged_attention_backward import ragged_attention_backward
from tests.helpers import assert_matches, randn
from tests.test_kernels_attention import BINARY, make_segments

SCALE = 0.3
WINDOWS: dict[str, list[tuple[int, list[int] | int]]] = {
    "first row": [(0, 1)],
    "from the start": [(0, 11)],
    "one row": [(4, 1)],
    "blocks": [(16, 16)],
    "edges of blocks": [(15, 17)],
    "all at once": [(33, 5), (0, 1), (15, 17), (0, 30), (7, 2)],
}


def check(
    batch: list[tuple[int, list[int] | int]], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, gap: int = 0
) -> None:
    segments, num_rows = make_segments(batch, gap)
    do, q = (randn(num_rows, heads[0], head_dim, dtype=dtype, seed=seed) / 2 for seed in (0, 1))
    k, v = (randn(512, heads[1], head_dim, dtype=dtype, seed=seed) / 2 for seed in (2, 3))
    expected = reference.ragged_attention_backward(do, q, k, v, segments, SCALE)
    placed = [AttentionSegment(start=s.start, end=s.end, slots_L=s.slots_L.to(stage.DEVICE)) for s in segments]
    put_do, put_q, put_k, put_v = (stage.put(x, dtype) for x in (do, q, k, v))
    actual = ragged_attention_backward(put_do, put_q, put_k, put_v, AttentionPlan(placed), SCALE)
    for found, wanted in zip(actual, expected, strict=True):
        assert_matches(found.cpu(), wanted)


@pytest.mark.parametrize("dtype", stage.DTYPES)
@pytest.mark.parametrize("batch", WINDOWS.values(), ids=WINDOWS)
def test_windows(batch: list[tuple[int, list[int] | int]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    check(batch, (6, 2), 8, dtype)


@pytest.mark.parametrize(("heads", "head_dim"), [((3, 1), 24), ((2, 2), 16)], ids=str)
def test_heads_and_sizes_and_idle_rows(heads: tuple[int, int], head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    check(WINDOWS["all at once"], heads, head_dim, torch.float32, gap=2)


def test_trees_and_other_heads_are_refused() -> None:
    q, k = stage.put(randn(7, 2, 4), torch.float32), stage.put(randn(512, 2, 4), torch.float32)
    segments, _ = make_segments([(0, BINARY)], gap=0)
    with pytest.raises(ValueError, match="a draft tree"):
        ragged_attention_backward(q, q, k, k, AttentionPlan(segments), 1.0)
    with pytest.raises(ValueError, match="do "):
        ragged_attention_backward(q[:3], q, k, k, AttentionPlan(segments), 1.0)
