"""All layers of a decoder in one call of the compiled library. Knows pointers and shapes, not requests.

The operations are those of `kernels.native.operations`, in the same order: the results are the same bit for bit. What is saved
is the way through Python and torch between them, a third of the time of a pass of few rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.linear import Linear
from kernels.native import operations as native
from kernels.native.lora import LayersLora
from kernels.segments import AttentionPlan

LANES = native.LANES


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """One layer: norms, fused linears, and the sliding window of its attention, if it has one."""

    input_norm_H: Tensor
    qkv: Linear
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    o: Linear
    post_norm_H: Tensor
    gate_up: Linear
    down: Linear
    window: int | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order of the computation."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def norms(self) -> tuple[Tensor | None, ...]:
        """Weights of norms."""
        return self.input_norm_H, self.q_norm_D, self.k_norm_D, self.post_norm_H


@dataclass(frozen=True, kw_only=True)
class StackShape:
    """Sizes of a decoder's layers; `scale` multiplies the products of queries and keys."""

    num_hidden: int
    num_inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float


class _Shape(ctypes.Structure):
    """shape_t of the C file."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "hidden", "inner", "heads", "kv_heads", "head_dim", "half")),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
    )


def takes(parts: Sequence[LayerParts], shape: StackShape) -> bool:
    """Whether the library computes every operation of these layers."""
    weights = [norm for part in parts for norm in part.norms if norm is not None]
    sizes = (shape.num_hidden, shape.num_inner, shape.head_dim // 2)
    return (
        bool(parts)
        and shape.head_dim % 2 == 0
        and all(size % LANES == 0 for size in sizes)
        and all(linear.packed is not None for part in parts for linear in part.linears)
        and all(native.takes(weight) and weight.is_contiguous() and weight.dtype == weights[0].dtype for weight in weights)
        and all(linear.dtype == weights[0].dtype for part in parts for linear in part.linears)
    )


class LayerStack:
    """Runs the layers on a batch; made once for a model that `takes` accepts."""

    def __init__(self, parts: Sequence[LayerParts], shape: StackShape) -> None:
        self._parts, self._shape = tuple(parts), shape
        self._dtype = parts[0].input_norm_H.dtype
        sizes = (shape.num_hidden, shape.num_inner, shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self._sizes = _Shape(len(parts), *sizes, native.ELEMENT[self._dtype], shape.eps, shape.scale)
        self._layers = np.array([_pointers(part) for part in parts], dtype=np.int64)
        library = native.loaded_library()
        self._call, self._sizes_ptr = library.heddle_layers, ctypes.addressof(self._sizes)
        self._width = int(library.heddle_layers_width(self._sizes_ptr))

    def __call__(
        self,
        x_TH: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        slots_T: Tensor,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        plan: AttentionPlan,
        lora: LayersLora | None,
        kept: Mapping[int, Tensor],
    ) -> Tensor:
        """Hidden states [T, H] behind the last layer, in x_TH's own memory. The plan's segments hold every row.

        `kept[n]` is filled with those behind the first n layers.
        """
        num_rows = x_TH.shape[0]
        heads, group = self._shape.num_heads, self._shape.num_heads // self._shape.num_kv_heads
        attention = plan.arranged(("native", heads, group), lambda: native.AttentionWork(plan.segments, heads, group))
        assert attention.num_rows == num_rows
        assert x_TH.is_contiguous()
        caches = np.array([cache.data_ptr() for cache in (*k_caches, *v_caches)], dtype=np.int64)
        keys = np.array([*attention.pointers, attention.num_tasks, attention.task_heads], dtype=np.int64)
        work = torch.empty(num_rows * self._width, dtype=self._dtype)
        copies = np.zeros(len(self._parts), dtype=np.int64)
        for num_layers, copy_TH in kept.items():
            assert copy_TH.is_contiguous()
            assert copy_TH.shape == x_TH.shape
            copies[num_layers - 1] = copy_TH.data_ptr()
        status = self._call(
            self._sizes_ptr,
            self._layers.ctypes.data,
            caches.ctypes.data,
            caches.ctypes.data + 8 * len(k_caches),
            keys.ctypes.data,
            None if lora is None else lora.pointer,
            cos_TD.data_ptr(),
            sin_TD.data_ptr(),
            slots_T.data_ptr(),
            num_rows,
            x_TH.data_ptr(),
            work.data_ptr(),
            copies.ctypes.data,
        )
        native.check(status)
        return x_TH


def _pointers(part: LayerParts) -> tuple[int, ...]:
    """layer_t of the C file; the weights are kept by `part`."""
    packed = [linear.packed for linear in part.linears]
    qkv, o, gate_up, down = (linear.pointers for linear in packed if linear is not None)
    input_norm, q_norm, k_norm, post_norm = (0 if norm is None else norm.data_ptr() for norm in part.norms)
    return (input_norm, *qkv, q_norm, k_norm, *o, post_norm, gate_up[0], down[0], part.window or 0)
