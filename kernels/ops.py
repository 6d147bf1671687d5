"""The one place that chooses the implementation of every tensor operation. Knows no formula."""

from __future__ import annotations

from kernels.attention import AttentionPlan, ragged_attention
from kernels.linear import Linear
from kernels.lora import LoraPlan, segmented_lora
from kernels.reference import (
    adamw,
    clip_grad_norm,
    commit_kv,
    linear_cross_entropy,
    rms_norm,
    rms_norm_backward,
    rope_and_cache,
    rope_backward,
    segmented_lora_backward,
    segmented_lora_weight_backward,
    silu_mul,
    silu_mul_backward,
    window_attention_backward,
)
from kernels.segments import AttentionSegment, LoraSegment

__all__ = [
    "AttentionPlan",
    "AttentionSegment",
    "Linear",
    "LoraPlan",
    "LoraSegment",
    "adamw",
    "clip_grad_norm",
    "commit_kv",
    "linear_cross_entropy",
    "ragged_attention",
    "rms_norm",
    "rms_norm_backward",
    "rope_and_cache",
    "rope_backward",
    "segmented_lora",
    "segmented_lora_backward",
    "segmented_lora_weight_backward",
    "silu_mul",
    "silu_mul_backward",
    "window_attention_backward",
]
