"""Cross entropy of a frozen head, LOGIT_ROWS rows of logits at a time; the matmuls are torch's. Knows no model.

T rows, H hidden, V vocabulary. The kernel turns a chunk of logits into its gradient where it lies: two reads and one write.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference import LOGIT_ROWS
from kernels.triton_ops.lang import constexpr, jit, next_power_of_2, scalar, tl

MAX_BLOCK = 4096
"""Logits of one step: 16 for each of 256 threads, two accesses of 16 bytes in half precision."""


@jit
def _cross_entropy_kernel(
    logits_ptr: scalar,
    labels_ptr: scalar,
    weights_ptr: scalar,
    loss_ptr: scalar,
    hits_ptr: scalar,
    V: scalar,
    BLOCK_V: constexpr,
) -> None:
    """loss = weight * (logsumexp(x) - x[label]); hit = argmax(x) == label; x becomes softmax(x) - onehot(label)"""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    x_ptr = logits_ptr + row * V
    at_label = tl.load(x_ptr + label).to(tl.float32)  # here, before any thread can have overwritten it
    total, highest, best = 0.0, float("-inf"), V
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)
        top = tl.max(x, axis=0)
        if top > highest:
            best = tl.min(tl.where(x == top, offs, V), axis=0)
            total = total * tl.exp(highest - top)
            highest = top
        total += tl.sum(tl.exp(x - highest), axis=0)
    lse = highest + tl.log(total)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    tl.store(loss_ptr + row, weight * (lse - at_label))
    tl.store(hits_ptr + row, (best == label).to(tl.int64))
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + offs, mask=offs < V, other=0.0).to(tl.float32)
        dx = tl.exp(x - lse) - tl.where(offs == label, 1.0, 0.0)
        tl.store(x_ptr + offs, dx.to(logits_ptr.dtype.element_ty), mask=offs < V)


def linear_cross_entropy(
    hidden_TH: Tensor, head_VH: Tensor, labels_T: Tensor, weights_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Semantics: the reference's linear_cross_entropy; a row of NaN logits is no hit."""
    num_words = head_VH.shape[0]
    if labels_T.shape != weights_T.shape or labels_T.shape != hidden_TH.shape[:1] or head_VH.shape[1] != hidden_TH.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_TH.shape)}, head {tuple(head_VH.shape)}, labels {tuple(labels_T.shape)}")
    device = hidden_TH.device
    live_rows = weights_T.nonzero().squeeze(1)
    losses = torch.zeros(live_rows.numel(), dtype=torch.float32, device=device)
    hits = torch.zeros(live_rows.numel(), dtype=torch.int64, device=device)
    dhidden_TH = torch.zeros_like(hidden_TH)
    done = 0
    for rows in torch.split(live_rows, LOGIT_ROWS):
        labels, weights = labels_T[rows], weights_T[rows].to(torch.float32)
        logits = hidden_TH[rows] @ head_VH.mT
        _cross_entropy_kernel[(rows.numel(),)](
            logits, labels, weights, losses[done:], hits[done:], num_words, BLOCK_V=min(next_power_of_2(num_words), MAX_BLOCK),
            num_warps=8,
        )  # fmt: skip
        dhidden_TH[rows] = (weights.unsqueeze(1) * (logits @ head_VH)).to(hidden_TH.dtype)
        done += rows.numel()
    loss_T = torch.zeros(hidden_TH.shape[0], dtype=torch.float32, device=device).index_copy_(0, live_rows, losses)
    hits_T = torch.zeros(hidden_TH.shape[0], dtype=torch.bool, device=device).index_copy_(0, live_rows, hits.bool())
    return loss_T, hits_T, dhidden_TH
