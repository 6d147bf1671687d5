"""The one place that chooses the implementation of every tensor operation. Knows no formula.

On a CPU: the compiled library (`kernels.native`) where it takes type and shape, else torch (`kernels.attention`, `reference`).
On CUDA: Triton (`kernels.triton_ops`), and on a CPU with HEDDLE_KERNELS=triton, in Triton's interpreter. What has no kernel of
its own is torch's on every device: draws from logits, clip_grad_norm, sgd, the GEMMs of `Linear`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import attention, attention_backward, bottleneck, dropout, lora, lora_backward, reference, sampling, triton_gate
from kernels.bottleneck import BottleneckPlan
from kernels.dropout import drop_keys
from kernels.linear import Linear
from kernels.lora import LoraPlan
from kernels.native import backward as native_backward
from kernels.native import layers as native_layers
from kernels.native import lora as native_lora
from kernels.native import memory
from kernels.native import operations as native
from kernels.native import sampling as native_sampling
from kernels.native.build import library
from kernels.native.layers import LayerParts, LayerStack, StackShape
from kernels.native.lora import AdapterTable, LayersLora
from kernels.reference import clip_grad_norm, sgd
from kernels.sampling import Draw
from kernels.segments import AttentionPlan, AttentionSegment, BottleneckSegment, LoraSegment
from kernels.triton_ops.attention_tables import AttentionTables, FixedPlan, TableRoom, host_tables
from kernels.triton_ops.lora_tables import AdapterMatrices, BatchTables

TRITON_TYPES = (torch.float16, torch.float32)
"""What Triton's interpreter multiplies; it takes bfloat16 for integers."""
interprets_triton = os.environ.get("HEDDLE_KERNELS") == "triton"
"""Whether CPU tensors of TRITON_TYPES go through Triton's interpreter (TRITON_INTERPRET=1): for tests, it is very slow."""

__all__ = [
    "AdapterMatrices",
    "AdapterTable",
    "AttentionPlan",
    "AttentionSegment",
    "AttentionTables",
    "BatchTables",
    "BottleneckPlan",
    "BottleneckSegment",
    "Draw",
    "FixedPlan",
    "LayerParts",
    "LayerStack",
    "LayersLora",
    "Linear",
    "LoraPlan",
    "LoraSegment",
    "StackShape",
    "TableRoom",
    "adamw",
    "add_attention_gradients",
    "add_rms_norm",
    "batched_lora",
    "clip_grad_norm",
    "commit_kv",
    "draw_tokens",
    "drawn",
    "drop",
    "drop_keys",
    "has_fast_bfloat16",
    "host_tables",
    "layer_stack",
    "linear_cross_entropy",
    "ragged_attention",
    "ragged_attention_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope_and_cache",
    "rope_backward",
    "segmented_bottleneck",
    "segmented_bottleneck_gradients",
    "segmented_lora",
    "segmented_lora_gradients",
    "sgd",
    "silu_mul",
    "silu_mul_backward",
    "token_losses",
    "uses_triton",
    "zero_weights",
]


def uses_triton(x: Tensor) -> bool:
    """Whether operations on this tensor are Triton's."""
    return x.is_cuda or (interprets_triton and x.dtype in TRITON_TYPES)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    if uses_triton(x_TH):
        result: Tensor = triton_gate.operations.rms_norm(x_TH, weight_H, eps)
        return result
    return (native.rms_norm if _is_native(x_TH, x_TH.shape[1]) else reference.rms_norm)(x_TH, weight_H, eps)


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`."""
    if uses_triton(x_TH):
        result: tuple[Tensor, Tensor] = triton_gate.operations.add_rms_norm(x_TH, residual_TH, weight_H, eps)
        return result
    return (native.add_rms_norm if _is_native(x_TH, x_TH.shape[1]) else reference.add_rms_norm)(
        x_TH, residual_TH, weight_H, eps
    )


def rms_norm_backward(dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm_backward`."""
    if uses_triton(x_TH):
        result: Tensor = triton_gate.operations.rms_norm_backward(dy_TH, x_TH, weight_H, eps)
        return result
    is_native = _is_native(x_TH, x_TH.shape[1]) and dy_TH.dtype == x_TH.dtype == weight_H.dtype
    function = native_backward.rms_norm_backward if is_native else reference.rms_norm_backward
    return function(dy_TH, x_TH, weight_H, eps)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """`reference.silu_mul`."""
    if uses_triton(gate_up_T2F):
        result: Tensor = triton_gate.operations.silu_mul(gate_up_T2F)
        return result
    return (native.silu_mul if _is_native(gate_up_T2F, gate_up_T2F.shape[1] // 2) else reference.silu_mul)(gate_up_T2F)


def silu_mul_backward(dz_TF: Tensor, gate_up_T2F: Tensor) -> Tensor:
    """`reference.silu_mul_backward`."""
    if uses_triton(gate_up_T2F):
        result: Tensor = triton_gate.operations.silu_mul_backward(dz_TF, gate_up_T2F)
        return result
    is_native = _is_native(gate_up_T2F, dz_TF.shape[1]) and dz_TF.dtype == gate_up_T2F.dtype
    function = native_backward.silu_mul_backward if is_native else reference.silu_mul_backward
    return function(dz_TF, gate_up_T2F)


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
    if uses_triton(q_TND):
        rotated: Tensor = triton_gate.operations.rope_and_cache(
            q_TND, k_TKD, v_TKD, cos_TD, sin_TD, k_cache_SKD, v_cache_SKD, slots_T
        )
        return rotated
    function = native.rope_and_cache if _is_native(q_TND, q_TND.shape[2] // 2) else reference.rope_and_cache
    return function(q_TND, k_TKD, v_TKD, cos_TD, sin_TD, k_cache_SKD, v_cache_SKD, slots_T)


def rope_backward(dx_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """`reference.rope_backward`."""
    function = triton_gate.operations.rope_backward if uses_triton(dx_TND) else reference.rope_backward
    return function(dx_TND, cos_TD, sin_TD)


def ragged_attention(
    q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, plan: AttentionPlan, scale: float, window: int | None = None
) -> Tensor:
    """`reference.ragged_attention` of a plan's segments."""
    if uses_triton(q_TND):
        return triton_gate.operations.ragged_attention(q_TND, k_cache_SKD, v_cache_SKD, plan, scale, window)
    is_native = plan.segments and _is_native(q_TND, q_TND.shape[2])
    function = native.ragged_attention if is_native else attention.ragged_attention
    return function(q_TND, k_cache_SKD, v_cache_SKD, plan, scale, window)


def commit_kv(k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], src_slots: Tensor, dst_slots: Tensor) -> None:
    """`reference.commit_kv`."""
    if k_caches and uses_triton(k_caches[0]):
        triton_gate.operations.commit_kv(k_caches, v_caches, src_slots, dst_slots)
        return
    is_native = k_caches and src_slots.shape == dst_slots.shape and native.takes(k_caches[0]) and k_caches[0].is_contiguous()
    (native.commit_kv if is_native else reference.commit_kv)(k_caches, v_caches, src_slots, dst_slots)


def drawn(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """`kernels.sampling.drawn`: a token for each draw, where the logits are."""
    if native.takes(logits_RV) and not uses_triton(logits_RV):
        return torch.tensor(native_sampling.draw_tokens(logits_RV, draws), dtype=torch.int64)
    return sampling.drawn(logits_RV, draws)


def draw_tokens(logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """`kernels.sampling.draw_tokens`: a token for each draw."""
    tokens: list[int] = drawn(logits_RV, draws).tolist() if draws else []
    return tokens


def segmented_lora(y_TO: Tensor, x_TI: Tensor, segments: LoraPlan | Sequence[LoraSegment]) -> None:
    """`reference.segmented_lora`; a plan saves arranging the segments again."""
    plan = segments if isinstance(segments, LoraPlan) else LoraPlan(segments)
    if uses_triton(y_TO):
        triton_gate.operations.segmented_lora(y_TO, x_TI, plan)
    elif plan.segments and native.takes(y_TO) and native_lora.takes(y_TO, x_TI, plan.segments):
        native_lora.segmented_lora(y_TO, x_TI, plan.work())
    else:
        lora.segmented_lora(y_TO, x_TI, plan)


def batched_lora(y_TO: Tensor, x_TI: Tensor, tables: BatchTables, layer: int, linear: int) -> None:
    """`reference.segmented_lora` of one linear's tables: two launches for each type that its adapters have, at most two."""
    triton_gate.operations.segmented_lora(y_TO, x_TI, tables.of(layer, linear))


def segmented_bottleneck(y_TH: Tensor, x_TH: Tensor, plan: BottleneckPlan) -> None:
    """`reference.segmented_bottleneck` of a plan's segments; x may be y."""
    bottleneck.segmented_bottleneck(y_TH, x_TH, plan, segmented_lora)


def linear_cross_entropy(hidden_TH: Tensor, head: Linear, labels_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.linear_cross_entropy`; the head is a linear that is ready to run. Labels and weights may be on the host."""
    if uses_triton(hidden_TH):
        return triton_gate.operations.linear_cross_entropy(hidden_TH, head, labels_T, weights_T)
    entropies = native_backward.entropies if native.takes(hidden_TH) else reference.entropies
    return reference.cross_entropy(hidden_TH, head, head.backward, labels_T, weights_T, entropies)


def token_losses(
    hidden_TH: Tensor, head: Callable[[Tensor], Tensor], labels_T: Tensor, weights_T: Tensor
) -> tuple[Tensor, Tensor]:
    """The first two results of `linear_cross_entropy`. Labels and weights may be on the host."""
    if uses_triton(hidden_TH):
        result: tuple[Tensor, Tensor] = triton_gate.operations.token_losses(hidden_TH, head, labels_T, weights_T)
        return result
    entropies = native_backward.entropies if native.takes(hidden_TH) else reference.entropies
    return reference.cross_entropy(hidden_TH, head, None, labels_T, weights_T, entropies)[:2]


def segmented_lora_gradients(
    dx_TI: Tensor | None, dy_TO: Tensor, x_TI: Tensor | None, grads: Sequence[tuple[Tensor, Tensor]] | None, plan: LoraPlan
) -> None:
    """`reference.segmented_lora_backward` and `segmented_lora_weight_backward` of a plan's segments; either may be left out."""
    if plan.segments and native.takes(dy_TO) and not uses_triton(dy_TO) and native_backward.lora_takes(plan.segments, grads):
        native_backward.segmented_lora_gradients(dx_TI, dy_TO, x_TI, grads, plan.segments, plan.order_T)
        return
    is_triton = plan.segments and uses_triton(dy_TO)
    function = triton_gate.operations.segmented_lora_gradients if is_triton else lora_backward.segmented_lora_gradients
    function(dx_TI, dy_TO, x_TI, grads, plan)


def segmented_bottleneck_gradients(
    dx_TH: Tensor | None, dy_TH: Tensor, x_TH: Tensor, grads: Sequence[tuple[Tensor, Tensor]], plan: BottleneckPlan
) -> None:
    """`kernels.bottleneck.segmented_bottleneck_gradients`."""
    functions = (segmented_lora, segmented_lora_gradients)
    bottleneck.segmented_bottleneck_gradients(dx_TH, dy_TH, x_TH, grads, plan, *functions)


def ragged_attention_backward(
    do_TND: Tensor, q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.ragged_attention_backward`, in float32 on CPUs: half precision rounds away differences of scores' gradients.

    The gradients of keys and values are in the type of the computation: they are summed on.
    """
    if uses_triton(q_TND):
        return triton_gate.operations.ragged_attention_backward(do_TND, q_TND, k_cache_SKD, v_cache_SKD, plan, scale)
    if q_TND.dtype != torch.bfloat16 or q_TND.device.type != "cpu":
        return attention_backward.ragged_attention_backward(do_TND, q_TND, k_cache_SKD, v_cache_SKD, plan, scale)
    o, dq, dk, dv = attention_backward.ragged_attention_backward(
        do_TND.float(), q_TND.float(), k_cache_SKD, v_cache_SKD, plan, scale
    )
    return o.to(q_TND.dtype), dq.to(q_TND.dtype), dk, dv


def add_attention_gradients(
    do_TND: Tensor,
    q_TND: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    plan: AttentionPlan,
    scale: float,
    places: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """`ragged_attention_backward`'s (output, dq); each segment's dk and dv are added to its places [L, K, D].

    The compiled one adds a key's gradients one by one, those of later rows first.
    """
    wide = all(part.dtype == torch.float32 and part.is_contiguous() for pair in places for part in pair)
    if wide and _is_native(q_TND, q_TND.shape[2]) and not uses_triton(q_TND):
        return native_backward.add_attention_gradients(
            do_TND, q_TND, k_cache_SKD, v_cache_SKD, plan.segments, plan.slots, scale, places
        )
    out_TND, dq_TND, dk_LKD, dv_LKD = ragged_attention_backward(do_TND, q_TND, k_cache_SKD, v_cache_SKD, plan, scale)
    num_keys = [segment.slots_L.numel() for segment in plan.segments]
    shares = [*torch.split(dk_LKD, num_keys), *torch.split(dv_LKD, num_keys)]
    torch._foreach_add_([dk for dk, _ in places] + [dv for _, dv in places], shares)
    return out_TND, dq_TND


def drop(x_TI: Tensor, keys_T: Tensor, rates_T: Tensor, salt: int) -> Tensor:
    """`kernels.dropout.drop`."""
    return (triton_gate.operations.drop if uses_triton(x_TI) else dropout.drop)(x_TI, keys_T, rates_T, salt)


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
    """`reference.adamw`."""
    function = triton_gate.operations.adamw if params and uses_triton(params[0]) else reference.adamw
    options = {"learning_rate": learning_rate, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    function(params, grads, exp_avg, exp_avg_sq, step=step, **options)


def layer_stack(parts: Sequence[LayerParts], shape: StackShape) -> LayerStack | None:
    """All layers as one operation, where the compiled library computes all of them; the same bits as one by one."""
    is_triton = bool(parts) and uses_triton(parts[0].input_norm_H)
    return LayerStack(parts, shape) if not is_triton and native_layers.takes(parts, shape) else None


def zero_weights(num_elements: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Zeros for weights that passes will read over and over."""
    is_cpu = device is None or device.type == "cpu"
    return memory.zeros(num_elements, dtype) if is_cpu else torch.zeros(num_elements, dtype=dtype, device=device)


def has_fast_bfloat16() -> bool:
    """Whether a CPU pass in bfloat16 beats one in float32 here: by the processor's instructions, or by the compiled ones."""
    return torch.cpu._is_avx512_bf16_supported() or library() is not None


def _is_native(x: Tensor, width: int) -> bool:
    return width % native.LANES == 0 and native.takes(x)
