"""The Triton kernels under the names and arguments of `kernels.ops`: tables of plans in, custom operations out. Knows none.

Imported when an operation first runs on tensors that take this path; importing it needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.linear import Linear
from kernels.lora import LoraPlan
from kernels.segments import AttentionPlan
from kernels.triton_ops import linear_cross_entropy as cross_entropy
from kernels.triton_ops import segmented_lora as lora
from kernels.triton_ops.adamw import adamw
from kernels.triton_ops.attention_tables import FixedPlan, attention_tables
from kernels.triton_ops.commit_kv import commit_kv
from kernels.triton_ops.drop import drop
from kernels.triton_ops.lora_tables import AdapterMatrices, BatchTables, LoraTables
from kernels.triton_ops.ragged_attention import ragged_attention as attend
from kernels.triton_ops.ragged_attention_backward import ragged_attention_backward
from kernels.triton_ops.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from kernels.triton_ops.rope_and_cache import rope_and_cache, rope_backward
from kernels.triton_ops.silu_mul import silu_mul, silu_mul_backward

__all__ = [
    "AdapterMatrices",
    "BatchTables",
    "adamw",
    "add_rms_norm",
    "commit_kv",
    "drop",
    "linear_cross_entropy",
    "ragged_attention",
    "ragged_attention_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope_and_cache",
    "rope_backward",
    "segmented_lora",
    "segmented_lora_gradients",
    "silu_mul",
    "silu_mul_backward",
    "token_losses",
]


def ragged_attention(
    q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, plan: AttentionPlan, scale: float, window: int | None
) -> Tensor:
    """Of a plan's segments."""
    group = q_TND.shape[1] // k_cache_SKD.shape[1]
    is_empty = not plan.segments and not isinstance(plan, FixedPlan)
    tables = None if is_empty else attention_tables(plan, group, window)
    return attend(_dense(q_TND), k_cache_SKD, v_cache_SKD, tables, scale)


def segmented_lora(y_TO: Tensor, x_TI: Tensor, plan: LoraPlan | Sequence[LoraTables]) -> None:
    """Of a plan's segments, or of tables that were made for a whole batch."""
    if isinstance(plan, LoraPlan):
        plan = _tables(plan, len(y_TO), x_TI.shape[1], y_TO.shape[1])
    lora.segmented_lora(y_TO, x_TI if x_TI.stride(1) == 1 else x_TI.contiguous(), plan)


def segmented_lora_gradients(
    dx_TI: Tensor | None, dy_TO: Tensor, x_TI: Tensor | None, grads: Sequence[tuple[Tensor, Tensor]] | None, plan: LoraPlan
) -> None:
    """Of a plan's segments."""
    num_in = plan.segments[0].a_RI.shape[1]
    lora.segmented_lora_gradients(dx_TI, dy_TO, x_TI, grads, _tables(plan, len(dy_TO), num_in, dy_TO.shape[1]), num_in)


def linear_cross_entropy(hidden_TH: Tensor, head: Linear, labels_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With a linear that is ready to run."""
    return cross_entropy.linear_cross_entropy(hidden_TH, head, head.backward, labels_T, weights_T)


def token_losses(hidden_TH: Tensor, head: cross_entropy.Product, labels_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and hits without a gradient."""
    return cross_entropy.linear_cross_entropy(hidden_TH, head, None, labels_T, weights_T)[:2]


def _tables(plan: LoraPlan, num_rows: int, num_in: int, num_out: int) -> list[LoraTables]:
    return plan.arranged("triton", lambda: lora.checked_tables(plan.segments, num_rows, num_in, num_out))


def _dense(x_TND: Tensor) -> Tensor:
    return x_TND if x_TND.stride()[1:] == (x_TND.shape[2], 1) else x_TND.contiguous()
