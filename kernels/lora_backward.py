"""Gradients through and of many adapters in a number of calls that does not depend on how many there are. Knows no model.

What is summed over rows is summed for each adapter by itself, in a batched matmul: a row that is not finite must not reach the
gradients of another adapter, and zero times infinity would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.lora import LoraCall, LoraPlan, keep_own, outputs


@dataclass(frozen=True, kw_only=True)
class _Spans:
    """J different runs of rows, padded to n: `rows_p` [J * n] of the call's; `own` tells the run of each of its segments."""

    num_runs: int
    rows_p: Tensor
    padding_Jn1: Tensor
    own: tuple[int, ...]

    def padded(self, x_nI: Tensor) -> Tensor:
        """[J, n, I]: padding repeats a run's last row."""
        return x_nI.index_select(0, self.rows_p).view(self.num_runs, -1, x_nI.shape[1])


def segmented_lora_gradients(
    dx_TI: Tensor | None, dy_TO: Tensor, x_TI: Tensor | None, grads: Sequence[tuple[Tensor, Tensor]] | None, plan: LoraPlan
) -> None:
    """The reference's segmented_lora_backward, and segmented_lora_weight_backward for grads of each of the plan's segments.

    Without `dx_TI` the former is left out, without `x_TI` and `grads` the latter.
    """
    for call in plan.calls():
        rows = call.shared.rows
        a_MI = torch.cat([segment.a_RI for segment in call.segments])
        dy_nO = dy_TO[rows].to(a_MI.dtype)
        low_nM = torch.cat([dy_nO[:, output.columns] @ output.b_OM for output in outputs(call)], dim=1)
        keep_own(low_nM, call, plan)
        if dx_TI is not None:
            dx_TI[rows] += low_nM @ a_MI
        if x_TI is None or grads is None:
            continue
        x_nI = x_TI[rows].to(a_MI.dtype)
        low_x_nM = x_nI @ a_MI.mT
        keep_own(low_x_nM, call, plan)
        shares = _single(call, dy_nO, low_nM, x_nI, low_x_nM) if plan.is_single else _many(call, dy_nO, low_nM, x_nI, low_x_nM)
        for i, share in enumerate(shares):
            torch._foreach_add_([grads[place][i] for place in call.order], share)


def _single(call: LoraCall, dy_nO: Tensor, low_nM: Tensor, x_nI: Tensor, low_x_nM: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(da, db) of the targets of one adapter."""
    da = torch.split(low_nM.mT @ x_nI, [segment.a_RI.shape[0] for segment in call.segments])
    return list(da), [dy_nO[:, output.columns].mT @ low_x_nM[:, output.ranks] for output in outputs(call)]


def _many(call: LoraCall, dy_nO: Tensor, low_nM: Tensor, x_nI: Tensor, low_x_nM: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(da, db) of each segment; products of a run with the ranks of others are zero, or not finite, and left out."""
    spans = _spans(call)
    da_JMI = spans.padded(low_nM).masked_fill_(spans.padding_Jn1, 0.0).mT @ spans.padded(x_nI)
    low_x_JnM = spans.padded(low_x_nM).masked_fill_(spans.padding_Jn1, 0.0)
    dy_JnO = spans.padded(dy_nO)
    da: list[Tensor] = []
    db: list[Tensor] = []
    edge = 0
    for output in outputs(call):
        db_JOM = dy_JnO[:, :, output.columns].mT @ low_x_JnM[:, :, output.ranks]
        for segment in call.segments[len(da) : len(da) + output.num_segments]:
            run, rank = spans.own[len(da)], segment.a_RI.shape[0]
            da.append(da_JMI[run, edge : edge + rank])
            db.append(db_JOM[run, :, edge - output.ranks.start : edge - output.ranks.start + rank])
            edge += rank
    return da, db


def _spans(call: LoraCall) -> _Spans:
    runs = list(dict.fromkeys(call.shared.spans))
    starts, ends = (np.array(edges)[:, None] for edges in zip(*runs, strict=True))
    rows = starts + np.arange((ends - starts).max())[None]
    device = call.shared.others_nM.device
    return _Spans(
        num_runs=len(runs),
        rows_p=torch.from_numpy(np.minimum(rows, ends - 1).ravel()).to(device),
        padding_Jn1=torch.from_numpy(rows >= ends).unsqueeze(2).to(device),
        own=tuple(runs.index(span) for span in call.shared.spans),
    )
