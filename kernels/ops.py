"""The one place that chooses the implementation of every tensor operation. Knows no formula.

On a CPU: the compiled library (`kernels.native`) where it takes type and shape, else torch (`kernels.attention`, `reference`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import attention, attention_backward, lora, lora_backward, reference, sampling
from kernels.dropout import drop, drop_keys
from kernels.linear import Linear
from kernels.lora import LoraPlan
from kernels.native import layers as native_layers
from kernels.native import lora as native_lora
from kernels.native import memory
from kernels.native import operations as native
from kernels.native import sampling as native_sampling
from kernels.native.build import library
from kernels.native.layers import LayerParts, LayerStack, StackShape
from kernels.native.lora import AdapterTable, LayersLora
from kernels.reference import (
    adamw,
    clip_grad_norm,
    rms_norm_backward,
    rope_backward,
    sgd,
    silu_mul_backward,
    token_losses,
)
from kernels.sampling import Draw
from kernels.segments import AttentionPlan, AttentionSegment, LoraSegment

__all__ = [
    "AdapterTable",
    "AttentionPlan",
    "AttentionSegment",
    "Draw",
    "LayerParts",
    "LayerStack",
    "LayersLora",
    "Linear",
    "LoraPlan",
    "LoraSegment",
    "StackShape",
    "adamw",
    "add_rms_norm",
    "clip_grad_norm",
    "commit_kv",
    "draw_tokens",
    "drop",
    "drop_keys",
    "has_fast_bfloat16",
    "layer_stack",
    "linear_cross_entropy",
    "ragged_attention",
    "ragged_attention_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope_and_cache",
    "rope_backward",
    "segmented_lora",
    "segmented_lora_gradients",
    "sgd",
    "silu_mul",
    "silu_mul_backward",
    "token_losses",
    "zero_weights",
]


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    return (native.rms_norm if _is_native(x_TH, x_TH.shape[1]) else reference.rms_norm)(x_TH, weight_H, eps)


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`."""
    return (native.add_rms_norm if _is_native(x_TH, x_TH.shape[1]) else reference.add_rms_norm)(
        x_TH, residual_TH, weight_H, eps
    )


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """`reference.silu_mul`."""
    return (native.silu_mul if _is_native(gate_up_T2F, gate_up_T2F.shape[1] // 2) else reference.silu_mul)(gate_up_T2F)


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
    """`reference.rope_and_cache`."""
    function = native.rope_and_cache if _is_native(q_TND, q_TND.shape[2] // 2) else reference.rope_and_cache
    return function(q_TND, k_TKD, v_TKD, cos_TD, sin_TD, k_cache_SKD, v_cache_SKD, slots_T)


def ragged_attention(
    q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, plan: AttentionPlan, scale: float, window: int | None = None
) -> Tensor:
    """`reference.ragged_attention` of a plan's segments."""
    is_native = plan.segments and _is_native(q_TND, q_TND.shape[2])
    function = native.ragged_attention if is_native else attention.ragged_attention
    return function(q_TND, k_cache_SKD, v_cache_SKD, plan, scale, window)


def commit_kv(k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], src_slots: Tensor, dst_slots: Tensor) -> None:
    """`reference.commit_kv`."""
    is_native = k_caches and src_slots.shape == dst_slots.shape and native.takes(k_caches[0]) and k_caches[0].is_contiguous()
    (native.commit_kv if is_native else reference.commit_kv)(k_caches, v_caches, src_slots, dst_slots)


def draw_tokens(logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """`kernels.sampling.draw_tokens`: a token for each draw."""
    if not draws:
        return []
    return (native_sampling.draw_tokens if native.takes(logits_RV) else sampling.draw_tokens)(logits_RV, draws)


def segmented_lora(y_TO: Tensor, x_TI: Tensor, segments: LoraPlan | Sequence[LoraSegment]) -> None:
    """`reference.segmented_lora`; a plan saves arranging the segments again."""
    plan = segments if isinstance(segments, LoraPlan) else LoraPlan(segments)
    if plan.segments and native.takes(y_TO) and native_lora.takes(y_TO, x_TI, plan.segments):
        native_lora.segmented_lora(y_TO, x_TI, plan.work())
    else:
        lora.segmented_lora(y_TO, x_TI, plan)


def linear_cross_entropy(hidden_TH: Tensor, head: Linear, labels_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.linear_cross_entropy`; the head is a linear that is ready to run."""
    return reference.cross_entropy(hidden_TH, head, head.backward, labels_T, weights_T)


def segmented_lora_gradients(
    dx_TI: Tensor | None, dy_TO: Tensor, x_TI: Tensor | None, grads: Sequence[tuple[Tensor, Tensor]] | None, plan: LoraPlan
) -> None:
    """`reference.segmented_lora_backward` and `segmented_lora_weight_backward` of a plan's segments; either may be left out."""
    lora_backward.segmented_lora_gradients(dx_TI, dy_TO, x_TI, grads, plan)


def ragged_attention_backward(
    do_TND: Tensor, q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.ragged_attention_backward`, in float32 where torch multiplies half precision without the processor's help.

    The gradients of keys and values are in the type of the computation: they are summed on.
    """
    if q_TND.dtype != torch.bfloat16 or q_TND.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return attention_backward.ragged_attention_backward(do_TND, q_TND, k_cache_SKD, v_cache_SKD, plan, scale)
    o, dq, dk, dv = attention_backward.ragged_attention_backward(
        do_TND.float(), q_TND.float(), k_cache_SKD, v_cache_SKD, plan, scale
    )
    return o.to(q_TND.dtype), dq.to(q_TND.dtype), dk, dv


def layer_stack(parts: Sequence[LayerParts], shape: StackShape) -> LayerStack | None:
    """All layers as one operation, where the compiled library computes all of them; the same bits as one by one."""
    return LayerStack(parts, shape) if native_layers.takes(parts, shape) else None


def zero_weights(num_elements: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Zeros for weights that passes will read over and over."""
    is_cpu = device is None or device.type == "cpu"
    return memory.zeros(num_elements, dtype) if is_cpu else torch.zeros(num_elements, dtype=dtype, device=device)


def has_fast_bfloat16() -> bool:
    """Whether a CPU pass in bfloat16 beats one in float32 here: by the processor's instructions, or by the compiled ones."""
    return torch.cpu._is_avx512_bf16_supported() or library() is not None


def _is_native(x: Tensor, width: int) -> bool:
    return width % native.LANES == 0 and native.takes(x)
