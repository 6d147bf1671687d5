"""Gradients of ragged causal attention in few large calls: windows of similar size share a padded one. Knows no model.

Shapes: B windows of a call, padded to n rows and L keys; K key/value heads, G query heads of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.reference import folded_attention_backward
from kernels.segments import AttentionPlan, AttentionSegment


@dataclass(frozen=True, kw_only=True)
class _Call:
    """`rows` and `keys` [B, n] and [B, L] are places in the batch and among all keys; padding repeats a window's last ones.

    `own_rows` and `own_keys` are the places, among the padded ones, of what is no padding.
    """

    num_windows: int
    rows: Tensor
    keys: Tensor
    own_rows: Tensor
    own_keys: Tensor
    padding_Bn: Tensor | None
    mask: Tensor
    """bool [B, 1, 1, n, L], True where a row sees a key."""


def ragged_attention_backward(
    do_TND: Tensor, q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference's ragged_attention_backward of a plan's segments, which are causal."""
    num_heads, head_dim = q_TND.shape[1:]
    num_kv_heads = k_cache_SKD.shape[1]
    slots_L = torch.cat([segment.slots_L for segment in plan.segments])
    k_LKD, v_LKD = (cache.index_select(0, slots_L).to(q_TND.dtype) for cache in (k_cache_SKD, v_cache_SKD))
    out_TND, dq_TND, dk_LKD, dv_LKD = (torch.zeros_like(tensor) for tensor in (q_TND, q_TND, k_LKD, v_LKD))
    for call in plan.arranged("backward", lambda: _arrange(plan.segments, do_TND.device)):
        B, group = call.num_windows, num_heads // num_kv_heads
        do = do_TND.index_select(0, call.rows)
        if call.padding_Bn is not None:
            do.masked_fill_(call.padding_Bn, 0.0)
        q, do = (
            tensor.view(B, -1, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4).reshape(B, num_kv_heads, -1, head_dim)
            for tensor in (q_TND.index_select(0, call.rows), do)
        )
        k, v = (
            tensor.index_select(0, call.keys).view(B, -1, num_kv_heads, head_dim).transpose(1, 2) for tensor in (k_LKD, v_LKD)
        )
        by_row_and_key = folded_attention_backward(do, q, k, v, call.mask, scale)
        rows, keys = call.rows.index_select(0, call.own_rows), call.keys.index_select(0, call.own_keys)
        for place, part in zip((out_TND, dq_TND), by_row_and_key[:2], strict=True):
            part = part.view(B, num_kv_heads, group, -1, head_dim).permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)
            place.index_copy_(0, rows, part.index_select(0, call.own_rows))
        for place, part in zip((dk_LKD, dv_LKD), by_row_and_key[2:], strict=True):
            part = part.transpose(1, 2).reshape(-1, num_kv_heads, head_dim)
            place.index_copy_(0, keys, part.index_select(0, call.own_keys))
    return out_TND, dq_TND, dk_LKD, dv_LKD


def _arrange(segments: Sequence[AttentionSegment], device: torch.device) -> list[_Call]:
    """Windows whose rows and keys are within a factor of two share a call."""
    ends = np.cumsum([segment.slots_L.numel() for segment in segments])
    shares: dict[tuple[int, int], list[tuple[AttentionSegment, int]]] = {}
    for segment, end in zip(segments, ends, strict=True):
        num_keys = segment.slots_L.numel()
        size = ((segment.end - segment.start).bit_length(), num_keys.bit_length())
        shares.setdefault(size, []).append((segment, int(end) - num_keys))
    return [_padded_call(share, device) for share in shares.values()]


def _padded_call(share: Sequence[tuple[AttentionSegment, int]], device: torch.device) -> _Call:
    num_rows = np.array([segment.end - segment.start for segment, _ in share])[:, None]
    num_keys = np.array([segment.slots_L.numel() for segment, _ in share])[:, None]
    first_row, first_key = (np.array(values)[:, None] for values in zip(*((s.start, key) for s, key in share), strict=True))
    row_Bn, key_BL = np.arange(num_rows.max())[None], np.arange(num_keys.max())[None]
    own_Bn, own_BL = row_Bn < num_rows, key_BL < num_keys
    last_seen_Bn = num_keys - num_rows + np.minimum(row_Bn, num_rows - 1)

    def move(values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    return _Call(
        num_windows=len(share),
        rows=move((first_row + np.minimum(row_Bn, num_rows - 1)).ravel()),
        keys=move((first_key + np.minimum(key_BL, num_keys - 1)).ravel()),
        own_rows=move(own_Bn.ravel().nonzero()[0]),
        own_keys=move(own_BL.ravel().nonzero()[0]),
        padding_Bn=None if own_Bn.all() else move(~own_Bn.reshape(-1, 1, 1)),
        mask=move((key_BL[:, None] <= last_seen_Bn[:, :, None])[:, None, None]),
    )
