"""The specification of every tensor operation in plain torch: the oracle of the tests and the CPU path. Knows no other device.

Shapes are named in `kernels.segments`. Half precision is widened to fp32 where Llama does it; fp64 stays fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.segments import AttentionSegment, BottleneckSegment, LoraSegment

LOGIT_ROWS = 128
"""Rows of logits that exist at a time in linear_cross_entropy."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps)"""
    wide = x_TH.to(_wide(x_TH.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_H * wide.to(x_TH.dtype)


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """m = x + residual, and rms_norm(m)"""
    m_TH = x_TH + residual_TH
    return m_TH, rms_norm(m_TH, weight_H, eps)


def rms_norm_backward(dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """dx = i * g - x * i^3 * mean(g * x) with g = dy * weight and i = 1 / rms(x)"""
    x = x_TH.to(_wide(x_TH.dtype))
    g = dy_TH.to(x.dtype) * weight_H
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    shared = inverse.pow(3) * (g * x).mean(-1, keepdim=True)
    return (g * inverse - x * shared).to(x_TH.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotates the pairs (i, i + D/2) of every head: Llama's half rotation."""
    return x_TND * cos_TD.unsqueeze(1) + _rotate_half(x_TND) * sin_TD.unsqueeze(1)


def rope_backward(dx_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """The inverse rotation: the gradient before RoPE from the one after it."""
    return rope(dx_TND, cos_TD, -sin_TD)


def rope_and_cache(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Semantics: k_cache[slots] = rope(k); v_cache[slots] = v, in place; returns rope(q). Negative slots: nowhere."""
    is_kept_T = slots_T >= 0
    k_cache_SKD.index_copy_(0, slots_T[is_kept_T], rope(k_TKD, cos_TD, sin_TD)[is_kept_T])
    v_cache_SKD.index_copy_(0, slots_T[is_kept_T], v_TKD[is_kept_T])
    return rope(q_TND, cos_TD, sin_TD)


def segment_mask(segment: AttentionSegment, window: int | None = None) -> Tensor:
    """bool [n, L]: all of the context, then the segment's own rows by its mask; of these, keys less than `window` away.

    Distances are between positions: a row's depth below the context is the number of other own rows that it sees.
    """
    num_rows, num_keys = segment.end - segment.start, segment.slots_L.numel()
    mask_nL = torch.ones(num_rows, num_keys, dtype=torch.bool, device=segment.slots_L.device)
    own = mask_nL[:, num_keys - num_rows :]
    own.copy_(own.tril() if segment.mask_nn is None else segment.mask_nn)
    if window is not None:
        positions_L = torch.arange(num_keys, device=mask_nL.device)
        positions_L[num_keys - num_rows :] = num_keys - num_rows - 1 + own.sum(1)
        mask_nL &= positions_L[num_keys - num_rows :, None] - positions_L < window
    return mask_nL


def ragged_attention(
    q_TND: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    segments: Sequence[AttentionSegment],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Semantics: out[s:e] = softmax(scale * q[s:e] k^T, masked) v over the segment's keys; rows of no segment are zero.

    With a window, a row sees only keys at positions p with row's position - p < window.
    """
    out_TND = torch.zeros_like(q_TND)
    for segment in segments:
        rows = slice(segment.start, segment.end)
        q_KWD = fold_heads(q_TND[rows], k_cache_SKD.shape[1])
        k_KLD, v_KLD = (cache.index_select(0, segment.slots_L).transpose(0, 1) for cache in (k_cache_SKD, v_cache_SKD))
        p_KWL = _probabilities(q_KWD, k_KLD, segment_mask(segment, window), scale)
        out_TND[rows] = unfold_heads(p_KWL.to(v_KLD.dtype) @ v_KLD, q_TND.shape[1])
    return out_TND


def fold_heads(x_WND: Tensor, num_kv_heads: int) -> Tensor:
    """[n, N, D] -> [K, G * n, D]: the G query heads of a key/value head become rows of one matmul."""
    num_rows, num_heads, head_dim = x_WND.shape
    grouped = x_WND.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return grouped.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)


def unfold_heads(x_KWD: Tensor, num_heads: int) -> Tensor:
    """The inverse of fold_heads."""
    num_kv_heads, num_rows, head_dim = x_KWD.shape
    group = num_heads // num_kv_heads
    grouped = x_KWD.reshape(num_kv_heads, group, num_rows // group, head_dim)
    return grouped.permute(2, 0, 1, 3).reshape(num_rows // group, num_heads, head_dim)


def _probabilities(q_KWD: Tensor, k_KLD: Tensor, mask_nL: Tensor, scale: float) -> Tensor:
    """Softmax in the wide type; the mask of n rows serves all G heads that were folded into rows."""
    scores = (q_KWD @ k_KLD.mT).to(_wide(q_KWD.dtype)).mul_(scale)
    scores.view(*scores.shape[:-2], -1, *mask_nL.shape[-2:]).masked_fill_(~mask_nL, float("-inf"))
    return scores.softmax(-1)


def window_attention_backward(
    do_WND: Tensor, q_WND: Tensor, k_LKD: Tensor, v_LKD: Tensor, start: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Causal attention of positions [start, start + W) over L = start + W keys to (output, dq, dk, dv).

    The probabilities are recomputed; dk and dv are this window's share for all its keys, summed over the heads of a group.
    """
    num_rows, num_heads, _ = q_WND.shape
    num_keys, num_kv_heads, _ = k_LKD.shape
    if num_keys != start + num_rows:
        raise ValueError(f"{num_keys} keys for a window of {num_rows} rows that starts at {start}")
    q, do = fold_heads(q_WND, num_kv_heads), fold_heads(do_WND, num_kv_heads)
    k, v = k_LKD.transpose(0, 1), v_LKD.transpose(0, 1)
    mask_WL = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q.device).tril(start)
    o, dq, dk, dv = folded_attention_backward(do, q, k, v, mask_WL, scale)
    return unfold_heads(o, num_heads), unfold_heads(dq, num_heads), dk.transpose(0, 1), dv.transpose(0, 1)


def folded_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask_nL: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, dq, dk, dv) of attention with folded heads: [..., K, G * n, D] rows, [..., K, L, D] keys."""
    p_wide = _probabilities(q, k, mask_nL, scale)
    p = p_wide.to(q.dtype)
    o, dv = p @ v, p.mT @ do
    shared = (do.to(p_wide.dtype) * o).sum(-1, keepdim=True)
    ds = p_wide.mul_(scale).mul_((do @ v.mT).to(p_wide.dtype).sub_(shared)).to(q.dtype)
    return o, ds @ k, ds.mT @ q, dv


def ragged_attention_backward(
    do_TND: Tensor, q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, segments: Sequence[AttentionSegment], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """window_attention_backward of each segment: (output, dq) of the batch's rows, (dk, dv) of all keys in segments' order."""
    out_TND, dq_TND = torch.zeros_like(q_TND), torch.zeros_like(q_TND)
    dk, dv = [], []
    for segment in segments:
        start = segment.slots_L.numel() - (segment.end - segment.start)
        keys, values = k_cache_SKD.index_select(0, segment.slots_L), v_cache_SKD.index_select(0, segment.slots_L)
        rows = segment.rows
        out_TND[rows], dq_TND[rows], dk_LKD, dv_LKD = window_attention_backward(
            do_TND[rows], q_TND[rows], keys, values, start, scale
        )
        dk.append(dk_LKD)
        dv.append(dv_LKD)
    return out_TND, dq_TND, torch.cat(dk), torch.cat(dv)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up; the first half of the columns is the gate."""
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_backward(dz_TF: Tensor, gate_up_T2F: Tensor) -> Tensor:
    """The gradients of gate and up, side by side as they came."""
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    dgate = torch.ops.aten.silu_backward(dz_TF * up, gate)
    return torch.cat((dgate, dz_TF * F.silu(gate)), dim=-1)


def segmented_lora(y_TO: Tensor, x_TI: Tensor, segments: Sequence[LoraSegment]) -> None:
    """Semantics: y[s:e, c] += scale * (x[s:e] @ a^T) @ b^T, in place, in the adapter's type; y is rounded once."""
    for segment in segments:
        low_nR = x_TI[segment.rows].to(segment.a_RI.dtype) @ segment.a_RI.mT
        y_TO[segment.rows, segment.columns].add_(low_nR @ segment.b_OR.mT, alpha=segment.scale)


def segmented_bottleneck(y_TH: Tensor, x_TH: Tensor, segments: Sequence[BottleneckSegment]) -> None:
    """Semantics: y[s:e] += activation(scale * x[s:e] @ down^T) @ up^T, in the adapter's type; gelu is the exact one."""
    for segment in segments:
        low_nR = segment.scale * (x_TH[segment.rows].to(segment.down_RH.dtype) @ segment.down_RH.mT)
        active_nR = low_nR.relu() if segment.activation == "relu" else F.gelu(low_nR)
        y_TH[segment.rows].add_(active_nR @ segment.up_HR.mT)


def segmented_lora_backward(dx_TI: Tensor, dy_TO: Tensor, segments: Sequence[LoraSegment]) -> None:
    """Semantics: dx[s:e] += scale * (dy[s:e, c] @ b) @ a, in place: the transposed adapter."""
    for segment in segments:
        low_nR = dy_TO[segment.rows, segment.columns].to(segment.b_OR.dtype) @ segment.b_OR
        dx_TI[segment.rows].add_(low_nR @ segment.a_RI, alpha=segment.scale)


def segmented_lora_weight_backward(
    grads: Sequence[tuple[Tensor, Tensor]], dy_TO: Tensor, x_TI: Tensor, segments: Sequence[LoraSegment]
) -> None:
    """Semantics, for grads (da_RI, db_OR) of each segment, in place: da += scale * (dy b)^T x; db += scale * dy^T (x a^T)."""
    for (da_RI, db_OR), segment in zip(grads, segments, strict=True):
        dy, x = dy_TO[segment.rows, segment.columns].to(da_RI.dtype), x_TI[segment.rows].to(da_RI.dtype)
        da_RI.addmm_((dy @ segment.b_OR).mT, x, alpha=segment.scale)
        db_OR.addmm_(dy.mT, x @ segment.a_RI.mT, alpha=segment.scale)


def linear_cross_entropy(
    hidden_TH: Tensor, head_VH: Tensor, labels_T: Tensor, weights_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row weight * cross entropy of hidden @ head^T, whether the argmax is the label, and the sum's gradient in hidden.

    The head is frozen. Rows of weight 0 cost nothing and hit nothing; the logits of LOGIT_ROWS rows exist at a time.
    """
    return cross_entropy(hidden_TH, lambda x: x @ head_VH.mT, lambda dy: dy @ head_VH, labels_T, weights_T)


Entropies = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""What `entropies` does."""


def entropies(logits_RV: Tensor, labels_R: Tensor, makes_gradient: bool) -> tuple[Tensor, Tensor]:
    """Per row -log softmax(logits)[label], and whether the argmax is the label; if asked, logits become softmax - one-hot."""
    labels = labels_R.unsqueeze(1)
    hits_R = (logits_RV.argmax(-1, keepdim=True) == labels).squeeze(1)
    log_probs = logits_RV.log_softmax(-1)
    loss_R = -log_probs.gather(1, labels).squeeze(1)
    if makes_gradient:
        logits_RV.copy_(log_probs.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=log_probs.dtype)))
    return loss_R, hits_R


def cross_entropy(
    hidden_TH: Tensor,
    head: Callable[[Tensor], Tensor],
    head_backward: Callable[[Tensor], Tensor] | None,
    labels_T: Tensor,
    weights_T: Tensor,
    entropies: Entropies = entropies,
) -> tuple[Tensor, Tensor, Tensor]:
    """linear_cross_entropy of any linear head and its backward; without one the gradient is zero."""
    wide = _wide(hidden_TH.dtype)
    loss_T = torch.zeros(hidden_TH.shape[0], dtype=wide, device=hidden_TH.device)
    hits_T = torch.zeros(hidden_TH.shape[0], dtype=torch.bool, device=hidden_TH.device)
    dhidden_TH = torch.zeros_like(hidden_TH)
    for rows in torch.split(weights_T.nonzero().squeeze(1), LOGIT_ROWS):
        weights = weights_T[rows].to(wide)
        logits = head(hidden_TH[rows]).to(wide)
        losses, hits_T[rows] = entropies(logits, labels_T[rows], head_backward is not None)
        loss_T[rows] = weights * losses
        if head_backward is not None:
            dhidden = head_backward(logits.to(hidden_TH.dtype))
            dhidden_TH[rows] = (weights.unsqueeze(1) * dhidden).to(hidden_TH.dtype)
    return loss_T, hits_T, dhidden_TH


def commit_kv(k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], src_slots: Tensor, dst_slots: Tensor) -> None:
    """Semantics, in every layer's cache: cache[dst] = cache[src], all reads before all writes, so the sets may overlap."""
    if src_slots.shape != dst_slots.shape:
        raise ValueError(f"src {tuple(src_slots.shape)} and dst {tuple(dst_slots.shape)} differ")
    for cache in (*k_caches, *v_caches):
        cache.index_copy_(0, dst_slots, cache.index_select(0, src_slots))


def clip_grad_norm(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """The norm of all gradients as one vector; scales them in place to `max_norm` if it is larger (0: never)."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads))))
    if max_norm > 0:
        torch._foreach_mul_(list(grads), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update in place, torch.optim.AdamW's formula; `step` counts from 1."""
    params, grads, exp_avg, exp_avg_sq = list(params), list(grads), list(exp_avg), list(exp_avg_sq)
    torch._foreach_mul_(params, 1 - learning_rate * weight_decay)
    torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, exp_avg, denominators, -learning_rate / (1 - beta1**step))


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One SGD update in place, torch.optim.SGD's formula (buffers start at zero); overwrites the gradients."""
    params, grads, buffers = list(params), list(grads), list(momentum_buffers)
    if weight_decay:
        torch._foreach_add_(grads, params, alpha=weight_decay)
    if momentum:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        grads = buffers
    torch._foreach_add_(params, grads, alpha=-learning_rate)
