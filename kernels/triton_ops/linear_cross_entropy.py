"""Cross entropy of a frozen head, LOGIT_ROWS rows of logits at a time; the matmuls are torch's. Knows no model.

T rows, H hidden, V vocabulary. The kernel turns a chunk of logits into its gradient where it lies: two reads and one write.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels.reference import LOGIT_ROWS
from kernels.triton_ops.lang import constexpr, jit, next_power_of_2, scalar, tl
from kernels.upload import upload

Product = Callable[[Tensor], Tensor]

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
    HAS_GRADIENT: constexpr,
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
    if HAS_GRADIENT:
        for start in range(0, V, BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            x = tl.load(x_ptr + offs, mask=offs < V, other=0.0).to(tl.float32)
            dx = tl.exp(x - lse) - tl.where(offs == label, 1.0, 0.0)
            tl.store(x_ptr + offs, dx.to(logits_ptr.dtype.element_ty), mask=offs < V)


@torch.library.custom_op("heddle::cross_entropy", mutates_args=("logits_RV",))
def cross_entropy(logits_RV: Tensor, labels_R: Tensor, weights_R: Tensor, has_gradient: bool) -> tuple[Tensor, Tensor]:
    """Per row weight * cross entropy (fp32) and whether the argmax is the label; with a gradient it replaces the logits."""
    num_rows, num_words = logits_RV.shape
    assert logits_RV.is_contiguous()
    loss_R = torch.empty(num_rows, dtype=torch.float32, device=logits_RV.device)
    hits_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    _cross_entropy_kernel[(num_rows,)](
        logits_RV, labels_R, weights_R, loss_R, hits_R, num_words, HAS_GRADIENT=has_gradient,
        BLOCK_V=min(next_power_of_2(num_words), MAX_BLOCK), num_warps=8,
    )  # fmt: skip
    return loss_R, hits_R


@cross_entropy.register_fake
def _(logits_RV: Tensor, labels_R: Tensor, weights_R: Tensor, has_gradient: bool) -> tuple[Tensor, Tensor]:
    shape = logits_RV.shape[:1]
    return logits_RV.new_empty(shape, dtype=torch.float32), logits_RV.new_empty(shape, dtype=torch.int64)


def linear_cross_entropy(
    hidden_TH: Tensor, head: Product, head_backward: Product | None, labels_T: Tensor, weights_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Semantics: the reference's cross_entropy; a row of NaN logits is no hit. Without a backward no gradient is made.

    Which rows have weight is known without a wait if the weights are on the host, which is where they are made.
    """
    if labels_T.shape != weights_T.shape or labels_T.shape != hidden_TH.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden_TH.shape)}, labels {tuple(labels_T.shape)}, weights {tuple(weights_T.shape)}")
    num_rows, device = len(hidden_TH), hidden_TH.device
    weights = weights_T.cpu().numpy().astype(np.float32)
    live = weights.nonzero()[0]
    rows_R, labels_R, weights_R = upload([live, labels_T.cpu().numpy()[live], weights[live]], device)
    dhidden_TH = torch.zeros_like(hidden_TH)
    losses, hits = [], []
    for chunk in range(0, len(live), LOGIT_ROWS):
        part = slice(chunk, chunk + LOGIT_ROWS)
        logits = head(hidden_TH[rows_R[part]])
        loss, hit = cross_entropy(logits, labels_R[part], weights_R[part], head_backward is not None)
        losses.append(loss)
        hits.append(hit)
        if head_backward is not None:
            gradient = weights_R[part].unsqueeze(1) * head_backward(logits)
            dhidden_TH.index_copy_(0, rows_R[part], gradient.to(hidden_TH.dtype))
    loss_T = torch.zeros(num_rows, dtype=torch.float32, device=device)
    hits_T = torch.zeros(num_rows, dtype=torch.bool, device=device)
    if losses:
        loss_T.index_copy_(0, rows_R, torch.cat(losses))
        hits_T.index_copy_(0, rows_R, torch.cat(hits).bool())
    return loss_T, hits_T, dhidden_TH
