"""The reference's gradients through the compiled library, but not of linears. Knows tensors and pointers.

A row's result does not depend on what shares the call. Sums over rows add to what is there, row after row in the caller's
order, so that they do not depend on how rows are divided among calls either. Sums are kept in float32, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.native.operations import ELEMENT, check, loaded_library
from kernels.segments import AttentionSegment, LoraSegment

PANEL = 16
"""PANEL of the C files: columns of a product that are computed together."""
_LORA = np.dtype(
    [(name, np.int64) for name in ("start", "end", "column", "num_out", "rank", "low")]
    + [(name, np.uint64) for name in ("a", "b", "da", "db")]
    + [("scale", np.float64)]
)
_LORA_CALL = np.dtype(
    [
        ("pointers", np.uint64, 3),
        ("strides", np.int64, 3),
        ("num_in", np.int64),
        ("segments", np.uint64),
        ("num_segments", np.int64),
        ("halves", np.int32, 3),
    ],
    align=True,
)


def lora_takes(segments: Sequence[LoraSegment], grads: Sequence[tuple[Tensor, Tensor]] | None) -> bool:
    """Whether the library computes with these adapters: float32, each matrix in one piece."""
    matrices = [matrix for s in segments for matrix in (s.a_RI, s.b_OR)] + [matrix for pair in grads or () for matrix in pair]
    return all(matrix.dtype == torch.float32 and matrix.is_contiguous() for matrix in matrices)


def segmented_lora_gradients(
    dx_TI: Tensor | None,
    dy_TO: Tensor,
    x_TI: Tensor | None,
    grads: Sequence[tuple[Tensor, Tensor]] | None,
    segments: Sequence[LoraSegment],
    order_T: Tensor | None,
) -> None:
    """`kernels.lora_backward.segmented_lora_gradients`; sums over rows take them in this order, ascending without one."""
    if dx_TI is not None and dx_TI.stride(1) != 1:
        raise ValueError(f"dx_TI: its rows are not contiguous: strides {dx_TI.stride()}")
    dy, x = _rows(dy_TO), None if x_TI is None or grads is None else _rows(x_TI)
    table = np.zeros(len(segments), dtype=_LORA)
    for place, s in enumerate(segments):
        da, db = (0, 0) if grads is None else (grads[place][0].data_ptr(), grads[place][1].data_ptr())
        sizes = (s.start, s.end, s.column, *s.b_OR.shape, 0)
        table[place] = (*sizes, s.a_RI.data_ptr(), s.b_OR.data_ptr(), da, db, s.scale)
    floats = 2 * (table["end"] - table["start"]) * (-(-table["rank"] // PANEL) * PANEL)
    table["low"] = np.cumsum(floats) - floats
    order = np.arange(len(dy)) if order_T is None else order_T.numpy()
    parts = (dy, x, dx_TI)
    call = np.zeros((), dtype=_LORA_CALL)
    call["pointers"] = [0 if part is None else part.data_ptr() for part in parts]
    call["strides"] = [0 if part is None else part.stride(0) for part in parts]
    call["num_in"], call["segments"], call["num_segments"] = segments[0].a_RI.shape[1], table.ctypes.data, len(table)
    call["halves"] = [0 if part is None else ELEMENT[part.dtype] for part in parts]
    sizes = (int(table["end"].max()), int(floats.sum()), int(table["rank"].max()))
    check(loaded_library().heddle_lora_backward(call.ctypes.data, order.ctypes.data, *sizes))


def rms_norm_backward(dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm_backward`."""
    dy_TH, x_TH = dy_TH.contiguous(), x_TH.contiguous()
    dx_TH = torch.empty_like(x_TH)
    pointers = (dy_TH.data_ptr(), x_TH.data_ptr(), weight_H.data_ptr(), dx_TH.data_ptr())
    loaded_library().heddle_rms_norm_backward(*pointers, *x_TH.shape, eps, ELEMENT[x_TH.dtype])
    return dx_TH


def silu_mul_backward(dz_TF: Tensor, gate_up_T2F: Tensor) -> Tensor:
    """`reference.silu_mul_backward`."""
    dz_TF, gate_up_T2F = dz_TF.contiguous(), gate_up_T2F.contiguous()
    out_T2F = torch.empty_like(gate_up_T2F)
    pointers = (dz_TF.data_ptr(), gate_up_T2F.data_ptr(), out_T2F.data_ptr())
    loaded_library().heddle_silu_mul_backward(*pointers, *dz_TF.shape, ELEMENT[dz_TF.dtype])
    return out_T2F


def entropies(logits_RV: Tensor, labels_R: Tensor, makes_gradient: bool) -> tuple[Tensor, Tensor]:
    """`reference.entropies` of float32 logits."""
    num_rows, num_words = logits_RV.shape
    labels_R = labels_R.contiguous()
    loss_R, hits_R = torch.empty(num_rows, dtype=torch.float32), torch.empty(num_rows, dtype=torch.bool)
    pointers = (logits_RV.data_ptr(), labels_R.data_ptr(), loss_R.data_ptr(), hits_R.data_ptr())
    loaded_library().heddle_losses(*pointers, num_rows, num_words, int(makes_gradient))
    return loss_R, hits_R


def add_attention_gradients(
    do_TND: Tensor,
    q_TND: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    segments: Sequence[AttentionSegment],
    slots_L: Tensor,
    scale: float,
    places: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """(output, dq); the gradients of each segment's keys and values are added to its `places`, float32 [L, K, D] each.

    A key gets those of later rows first: windows that go from right to left make the same sum however they are cut.
    """
    rows_type = q_TND.dtype if q_TND.dtype == do_TND.dtype and q_TND.dtype in ELEMENT else torch.float32
    do, q = (tensor.to(rows_type).contiguous() for tensor in (do_TND, q_TND))
    out_TND, dq_TND = torch.empty_like(q), torch.empty_like(q)
    num_keys = np.array([segment.slots_L.numel() for segment in segments])
    first_keys = np.cumsum(num_keys) - num_keys
    table = np.array(
        [
            (s.start, s.end, first, keys, dk.data_ptr(), dv.data_ptr())
            for s, first, keys, (dk, dv) in zip(segments, first_keys, num_keys, places, strict=True)
        ],
        dtype=np.int64,
    )
    table = table[np.argsort((table[:, 0] - table[:, 1]) * num_keys, kind="stable")]  # the longest first: threads end together
    pointers = [tensor.data_ptr() for tensor in (do, q, k_cache_SKD, v_cache_SKD, out_TND, dq_TND)]
    sizes = (q.shape[1], k_cache_SKD.shape[1], q.shape[2])
    check(
        loaded_library().heddle_attention_backward(
            *pointers,
            table.ctypes.data,
            len(table),
            slots_L.data_ptr(),
            *sizes,
            scale,
            ELEMENT[k_cache_SKD.dtype],
            ELEMENT[rows_type],
        )
    )
    return out_TND.to(q_TND.dtype), dq_TND.to(q_TND.dtype)


def _rows(x_TI: Tensor) -> Tensor:
    return x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
