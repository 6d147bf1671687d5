"""The GPU benchmark's cases of attention, and the same by torch and FlashInfer. Knows no clock.

B sequences, L keys of each; N query heads, K key/value heads, D head_dim, S cache slots.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_case import Case, Goal, Randn, Sizes
from kernels import reference
from kernels.segments import AttentionPlan, AttentionSegment
from kernels.triton_ops.attention_tables import attention_tables
from kernels.triton_ops.ragged_attention import ragged_attention
from kernels.triton_ops.ragged_attention_backward import ragged_attention_backward

PAGE = 16
"""Slots of one of FlashInfer's pages."""
WORKSPACE_BYTES = 128 << 20
Peer = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Part:
    """`rows` behind a context; a tree's `parents` tell what each row sees of them."""

    context: int
    rows: int = 1
    parents: tuple[int, ...] | None = None


def attention_case(name: str, parts: list[Part], sizes: Sizes, randn: Randn, goal: Goal | None = None) -> Case:
    """What a row cannot see is not counted as work."""
    N, K, D = sizes.heads, sizes.kv_heads, sizes.head_dim
    num_slots = sum(part.context + part.rows for part in parts)
    num_rows = sum(part.rows for part in parts)
    q, k, v = randn(num_rows, N, D), randn(num_slots, K, D), randn(num_slots, K, D)
    free, segments, start = torch.randperm(num_slots, device=q.device), [], 0
    for part in parts:
        slots, free = free[: part.context + part.rows], free[part.context + part.rows :]
        mask = None if part.parents is None else _ancestors(part.parents)
        segments.append(AttentionSegment(start=start, end=start + part.rows, slots_L=slots, mask_nn=mask))
        start += part.rows
    tables, scale = attention_tables(AttentionPlan(segments), N // K, None), D**-0.5
    pairs = sum(part.rows * part.context + part.rows * (part.rows + 1) // 2 for part in parts)
    return Case(
        kernel="ragged_attention", shape=f"{name}, context {parts[0].context}, rows {num_rows}",
        run=lambda: (ragged_attention(q, k, v, tables, scale),),
        oracle=lambda: (reference.ragged_attention(q, k, v, segments, scale),),
        peers=_peers(q, k, v, segments, parts, scale), goal=goal,
        num_bytes=(2 * num_slots * K * D + 2 * num_rows * N * D) * q.element_size(), num_flops=4 * N * D * pairs,
    )  # fmt: skip


def window_case(sizes: Sizes, randn: Randn) -> Case:
    """The backward pass of a window: the last quarter of the prefill's length."""
    N, K, D, end = sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.prefill
    W, scale = end // 4, sizes.head_dim**-0.5
    do, q, k, v = randn(W, N, D), randn(W, N, D), randn(end, K, D), randn(end, K, D)
    segments = [AttentionSegment(start=0, end=W, slots_L=torch.randperm(end, device=q.device))]
    plan = AttentionPlan(segments)
    pairs = W * (end - W) + W * (W + 1) // 2
    return Case(
        kernel="ragged_attention_backward", shape=f"{W} rows, {end} keys", num_flops=14 * N * D * pairs,
        run=lambda: ragged_attention_backward(do, q, k, v, plan, scale),
        oracle=lambda: reference.ragged_attention_backward(do, q, k, v, segments, scale),
    )  # fmt: skip


def binary_tree(num_nodes: int) -> tuple[int, ...]:
    """The parents of a tree with two children to a node."""
    return tuple((node - 1) // 2 if node else -1 for node in range(num_nodes))


def _ancestors(parents: tuple[int, ...]) -> Tensor:
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def _peers(
    q: Tensor, k: Tensor, v: Tensor, segments: list[AttentionSegment], parts: list[Part], scale: float
) -> dict[str, Peer]:
    """Of equal sequences that decode, or of one prompt: with keys and values in the order and layout that each likes best."""
    first, slots = parts[0], torch.cat([segment.slots_L for segment in segments])
    is_prompt = len(parts) == 1 and first.context == 0
    if first.parents is not None or any(part != first for part in parts) or not (first.rows == 1 or is_prompt):
        return {}
    k_BLKD, v_BLKD = (x[slots].view(len(parts), -1, *x.shape[1:]) for x in (k, v))
    q_BNTD = q.view(len(parts), first.rows, *q.shape[1:]).transpose(1, 2).contiguous()
    k_BKLD, v_BKLD = (x.transpose(1, 2).contiguous() for x in (k_BLKD, v_BLKD))
    found = _torch_peers(q_BNTD, k_BKLD, v_BKLD, is_prompt, scale)
    if q.is_cuda and first.rows == 1 and importlib.util.find_spec("flashinfer"):
        found["FlashInfer"] = _flashinfer(q, k_BLKD, v_BLKD, scale)
    return found


def _torch_peers(q: Tensor, k: Tensor, v: Tensor, is_prompt: bool, scale: float) -> dict[str, Peer]:
    def rows(out_BNTD: Tensor) -> Tensor:
        return out_BNTD.transpose(1, 2).flatten(0, 1)

    found: dict[str, Peer] = {
        "SDPA": lambda: rows(F.scaled_dot_product_attention(q, k, v, is_causal=is_prompt, scale=scale, enable_gqa=True))
    }
    if q.is_cuda:  # it is for compiled code, which takes long on a CPU
        flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
        attend: Any = torch.compile(flex.flex_attention, dynamic=False)
        num_rows, num_keys = q.shape[2], k.shape[2]
        causal = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, num_rows, num_keys) if is_prompt else None
        found["FlexAttention"] = lambda: rows(attend(q, k, v, block_mask=causal, scale=scale, enable_gqa=True))
    return found


def _flashinfer(q: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, scale: float) -> Peer:
    """Decoding over pages; the plan is made once, as an engine makes it once for all layers."""
    flashinfer: Any = importlib.import_module("flashinfer")
    num_sequences, num_keys, num_kv_heads, head_dim = k_BLKD.shape
    pages = -(-num_keys // PAGE)
    padding = (0, 0, 0, 0, 0, pages * PAGE - num_keys)
    paged = [F.pad(x, padding).view(-1, PAGE, num_kv_heads, head_dim) for x in (k_BLKD, v_BLKD)]
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    edges = torch.arange(num_sequences + 1, dtype=torch.int32, device=q.device) * pages
    last = torch.full((num_sequences,), num_keys - (pages - 1) * PAGE, dtype=torch.int32, device=q.device)
    order = torch.arange(num_sequences * pages, dtype=torch.int32, device=q.device)
    wrapper.plan(
        edges, order, last, q.shape[1], num_kv_heads, head_dim, PAGE, q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=scale
    )

    def run() -> Tensor:
        out: Tensor = wrapper.run(q, (paged[0], paged[1]))
        return out

    return run
