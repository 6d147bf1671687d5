"""The reference's operations through the compiled library. Knows tensors and pointers; who may call what is `takes`.

In half precision sums are kept in float32 and rounded once, where the reference rounds after every step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.native import memory
from kernels.native.build import library
from kernels.segments import AttentionPlan, AttentionSegment

LANES = 8
PANEL = 16
MAX_TASK_ROWS = 16
"""Rows of a segment that share the keys they read."""
MAX_TASK_SCORES = 1 << 17
"""Scores of one task, in floats: they stay in the second-level cache."""
ELEMENT = {torch.bfloat16: 1, torch.float32: 0}


def takes(x: Tensor) -> bool:
    """Whether the library is there and computes in the type and on the device of this tensor."""
    return x.dtype in ELEMENT and x.device.type == "cpu" and library() is not None


def loaded_library() -> Any:
    """The library; `takes` was asked before."""
    loaded = library()
    assert loaded is not None, "callers ask `takes` first"
    return loaded


def check(status: int) -> None:
    """Raises MemoryError if an operation had no memory for its scratch space."""
    if status:
        raise MemoryError("no memory for a compiled operation's scratch space")


class PackedLinear:
    """y_TO = x_TI @ weight_OI^T + bias_O; with `transposed` the weight is given as [I, O], which need not be kept."""

    def __init__(self, weight: Tensor, bias_O: Tensor | None = None, *, transposed: bool = False) -> None:
        weight = weight.contiguous()
        self.num_in, self.num_out = weight.shape if transposed else weight.shape[::-1]
        self._half, self._dtype = ELEMENT[weight.dtype], weight.dtype
        num_rows = loaded_library().heddle_packed_inputs(self.num_in, self._half)
        self._packed = memory.empty(-(-self.num_out // PANEL), num_rows, PANEL, dtype=weight.dtype)
        self._bias = None if bias_O is None else bias_O.to(weight.dtype).contiguous()
        loaded_library().heddle_pack(
            weight.data_ptr(), self._packed.data_ptr(), self.num_out, self.num_in, int(transposed), self._half
        )
        self._call, self._weight_ptr = loaded_library().heddle_linear, self._packed.data_ptr()
        self._bias_ptr = None if self._bias is None else self._bias.data_ptr()

    def backward(self, dy_TO: Tensor) -> Tensor:
        """dx_TI = dy_TO @ weight_OI. Raises ValueError for a gradient of another width."""
        if dy_TO.shape[1] != self.num_out:
            raise ValueError(f"gradient {tuple(dy_TO.shape)} of a linear of {self.num_out} outputs")
        dy = dy_TO if dy_TO.stride(1) == 1 else dy_TO.contiguous()
        dx_TI = torch.empty(len(dy), self.num_in, dtype=dy.dtype)
        pointers = (dy.data_ptr(), dy.stride(0), self._weight_ptr, dx_TI.data_ptr())
        sizes = (len(dy), self.num_out, self.num_in)
        check(loaded_library().heddle_linear_backward(*pointers, *sizes, ELEMENT[dy.dtype], self._half))
        return dx_TI

    def weight(self) -> Tensor:
        """A copy of the plain weight [O, I]."""
        num_panels, num_rows, _ = self._packed.shape
        if self._half:  # of each pair of inputs, all outputs of the panel lie side by side
            parts = self._packed.view(num_panels, num_rows // 2, PANEL, 2).permute(0, 2, 1, 3)
        else:
            parts = self._packed.transpose(1, 2)
        return parts.reshape(num_panels * PANEL, num_rows)[: self.num_out, : self.num_in].contiguous()

    @property
    def pointers(self) -> tuple[int, int]:
        """Of the packed weight and of the bias, 0 for none."""
        return self._weight_ptr, self._bias_ptr or 0

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Raises ValueError for an input of another shape or type."""
        if x_TI.shape[1] != self.num_in or x_TI.dtype != self._dtype:
            raise ValueError(f"input {tuple(x_TI.shape)} {x_TI.dtype} of a linear of {self.num_in} inputs in {self._dtype}")
        if x_TI.stride(1) != 1:
            x_TI = x_TI.contiguous()
        num_rows, num_out = x_TI.shape[0], self.num_out
        y_TO = torch.empty(num_rows, num_out, dtype=self._dtype)
        if num_rows:
            check(
                self._call(
                    x_TI.data_ptr(),
                    x_TI.stride(0),
                    self._weight_ptr,
                    self._bias_ptr,
                    y_TO.data_ptr(),
                    num_out,
                    num_rows,
                    self.num_in,
                    num_out,
                    self._half,
                )
            )
        return y_TO


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    x_TH = x_TH.contiguous()
    y_TH = torch.empty_like(x_TH)
    loaded_library().heddle_rms_norm(
        x_TH.data_ptr(), None, weight_H.data_ptr(), None, y_TH.data_ptr(), *x_TH.shape, eps, ELEMENT[x_TH.dtype]
    )
    return y_TH


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`."""
    x_TH, residual_TH = x_TH.contiguous(), residual_TH.contiguous()
    m_TH, y_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    loaded_library().heddle_rms_norm(
        x_TH.data_ptr(),
        residual_TH.data_ptr(),
        weight_H.data_ptr(),
        m_TH.data_ptr(),
        y_TH.data_ptr(),
        *x_TH.shape,
        eps,
        ELEMENT[x_TH.dtype],
    )
    return m_TH, y_TH


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """`reference.silu_mul`."""
    gate_up_T2F = gate_up_T2F.contiguous()
    num_rows, num_inner = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    y_TF = torch.empty(num_rows, num_inner, dtype=gate_up_T2F.dtype)
    loaded_library().heddle_silu_mul(gate_up_T2F.data_ptr(), y_TF.data_ptr(), num_rows, num_inner, ELEMENT[y_TF.dtype])
    return y_TF


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
    """`reference.rope_and_cache`; heads of a row must lie side by side."""
    num_rows, num_heads, head_dim = q_TND.shape
    out_TND = torch.empty(num_rows, num_heads, head_dim, dtype=q_TND.dtype)
    loaded_library().heddle_rope_and_cache(
        q_TND.data_ptr(),
        q_TND.stride(0),
        k_TKD.data_ptr(),
        k_TKD.stride(0),
        v_TKD.data_ptr(),
        v_TKD.stride(0),
        cos_TD.data_ptr(),
        sin_TD.data_ptr(),
        out_TND.data_ptr(),
        k_cache_SKD.data_ptr(),
        v_cache_SKD.data_ptr(),
        slots_T.data_ptr(),
        num_rows,
        num_heads,
        k_TKD.shape[1],
        head_dim,
        ELEMENT[q_TND.dtype],
    )
    return out_TND


def ragged_attention(
    q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, plan: AttentionPlan, scale: float, window: int | None = None
) -> Tensor:
    """`reference.ragged_attention`, one call for all segments."""
    num_rows, num_heads, head_dim = q_TND.shape
    group = num_heads // k_cache_SKD.shape[1]
    work = plan.arranged(("native", num_heads, group), lambda: AttentionWork(plan.segments, num_heads, group))
    q_TND = q_TND.contiguous()
    out_TND = torch.empty_like(q_TND) if work.num_rows == num_rows else torch.zeros_like(q_TND)
    check(
        loaded_library().heddle_attention(
            q_TND.data_ptr(),
            k_cache_SKD.data_ptr(),
            v_cache_SKD.data_ptr(),
            out_TND.data_ptr(),
            *work.pointers,
            work.num_tasks,
            work.task_heads,
            num_heads,
            k_cache_SKD.shape[1],
            head_dim,
            scale,
            window or 0,
            ELEMENT[q_TND.dtype],
        )
    )
    return out_TND


def commit_kv(k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], src_slots: Tensor, dst_slots: Tensor) -> None:
    """`reference.commit_kv`, one call for all layers; the caches are contiguous and have rows of one size."""
    caches = [cache.data_ptr() for cache in (*k_caches, *v_caches)]
    row_bytes = k_caches[0].stride(0) * k_caches[0].element_size()
    pointers = (ctypes.c_void_p * len(caches))(*caches)
    slots = (src_slots.contiguous(), dst_slots.contiguous())
    check(
        loaded_library().heddle_commit_kv(
            pointers, len(caches), slots[0].data_ptr(), slots[1].data_ptr(), len(src_slots), row_bytes
        )
    )


class AttentionWork:
    """The segments of a batch as the C library takes them, and their division into tasks for its threads."""

    def __init__(self, segments: Sequence[AttentionSegment], num_heads: int, group: int) -> None:
        self.num_rows = sum(segment.end - segment.start for segment in segments)
        chunks = [chunk for index, segment in enumerate(segments) for chunk in _row_chunks(index, segment, group)]
        self.task_heads = group if len(chunks) * (num_heads // group) >= torch.get_num_threads() else 1
        starts = np.arange(0, num_heads, self.task_heads)
        tasks = np.repeat(np.array(chunks, dtype=np.int64).reshape(-1, 4), len(starts), axis=0)
        tasks[:, 3] = np.tile(starts, len(chunks))
        masks, words = _packed_masks(segments)
        first_keys = np.cumsum([0, *(segment.slots_L.numel() for segment in segments)])
        table = np.array(
            [
                (segment.start, segment.end, first_key, segment.slots_L.numel(), *mask)
                for segment, first_key, mask in zip(segments, first_keys, masks, strict=False)
            ],
            dtype=np.int64,
        )
        slots = torch.cat([segment.slots_L for segment in segments])
        self.num_tasks = len(tasks)
        self._kept = (table, slots, words, tasks)
        self.pointers = (table.ctypes.data, slots.data_ptr(), words.ctypes.data, tasks.ctypes.data)


def _row_chunks(index: int, segment: AttentionSegment, group: int) -> list[tuple[int, int, int, int]]:
    """The segment's rows in pieces whose scores fit the cache, the longest rows first."""
    num_rows, num_keys = segment.end - segment.start, segment.slots_L.numel()
    size = max(1, min(MAX_TASK_ROWS, MAX_TASK_SCORES // (group * num_keys)))
    return [(index, start, min(start + size, num_rows), 0) for start in range(0, num_rows, size)][::-1]


def _packed_masks(segments: Sequence[AttentionSegment]) -> tuple[list[tuple[int, int]], np.ndarray[Any, Any]]:
    """Of each segment the first word of its mask and the words of a row (-1, 0 without one); all words."""
    places, parts, offset = [], [np.zeros(1, dtype=np.uint64)], 1
    for segment in segments:
        if segment.mask_nn is None:
            places.append((-1, 0))
            continue
        bits = np.packbits(segment.mask_nn.numpy(), axis=1, bitorder="little")
        num_words = -(-bits.shape[1] // 8)
        padded = np.zeros((len(bits), num_words * 8), dtype=np.uint8)
        padded[:, : bits.shape[1]] = bits
        places.append((offset, num_words))
        parts.append(padded.view(np.uint64).ravel())
        offset += parts[-1].size
    return places, np.concatenate(parts)
