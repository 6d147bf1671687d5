"""Bottleneck adapters of many rows: two low-rank products and an activation between them. Knows no model.

The products are LoRA's, one with the identity as B, the other with the identity as A: multiplying by it changes no bit. So what
holds for LoRA holds here: the number of calls, the order of sums, that no row depends on another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lora import LoraPlan
from kernels.segments import BottleneckSegment, LoraSegment
from kernels.upload import upload

Update = Callable[[Tensor, Tensor, LoraPlan], None]
Pairs = Sequence[tuple[Tensor, Tensor]]
Gradients = Callable[[Tensor | None, Tensor, Tensor | None, Pairs | None, LoraPlan], None]
"""`ops.segmented_lora` and `ops.segmented_lora_gradients`."""


class BottleneckPlan:
    """The segments behind one linear, arranged once; there is at least one, and no row has two. W: the largest rank.

    `masks` and `order_T` as LoraPlan has them.
    """

    def __init__(
        self,
        segments: Sequence[BottleneckSegment],
        masks: dict[object, object] | None = None,
        order_T: Tensor | None = None,
    ) -> None:
        self.segments = tuple(segments)
        self.width = max(segment.down_RH.shape[0] for segment in segments)
        down, up = [], []
        for s in segments:
            identity = (s.down_RH.shape[0], self.width, s.down_RH.dtype, s.down_RH.device)
            down.append(LoraSegment(start=s.start, end=s.end, a_RI=s.down_RH, b_OR=_identity(*identity)[1], scale=s.scale))
            up.append(LoraSegment(start=s.start, end=s.end, a_RI=_identity(*identity)[0], b_OR=s.up_HR, scale=1.0))
        self.down, self.up = LoraPlan(down, masks, order_T), LoraPlan(up, masks, order_T)
        self.activations = {segment.activation for segment in segments}
        self._is_gelu_T1: Tensor | None = None

    def choose(self, relu_TW: Tensor, gelu_TW: Tensor) -> Tensor:
        """Of each row what its activation made."""
        if self._is_gelu_T1 is None or len(self._is_gelu_T1) != len(relu_TW):
            is_gelu = np.zeros((len(relu_TW), 1), dtype=np.bool_)
            for segment in self.segments:
                is_gelu[segment.start : segment.end] = segment.activation == "gelu"
            self._is_gelu_T1 = upload([is_gelu], relu_TW.device)[0]
        return torch.where(self._is_gelu_T1, gelu_TW, relu_TW)


def segmented_bottleneck(y_TH: Tensor, x_TH: Tensor, plan: BottleneckPlan, update: Update) -> None:
    """The reference's segmented_bottleneck of a plan's segments; x may be y."""
    low_TW = _low(x_TH, plan, update)
    update(y_TH, _active(low_TW, plan), plan.up)


def segmented_bottleneck_gradients(
    dx_TH: Tensor | None,
    dy_TH: Tensor,
    x_TH: Tensor,
    grads: Pairs,
    plan: BottleneckPlan,
    update: Update,
    gradients: Gradients,
) -> None:
    """Add the gradients of segmented_bottleneck: of x to dx, if there is one, of each segment's (down, up) to its grads."""
    low_TW = _low(x_TH, plan, update)
    dactive_TW = torch.zeros_like(low_TW)
    unused = _like_identities(plan)
    up_grads = [(identity, dup_HR) for (identity, _), (_, dup_HR) in zip(unused, grads, strict=True)]
    gradients(dactive_TW, dy_TH, _active(low_TW, plan), up_grads, plan.up)
    down_grads = [(ddown_RH, identity) for (_, identity), (ddown_RH, _) in zip(unused, grads, strict=True)]
    gradients(dx_TH, _active_backward(dactive_TW, low_TW, plan), x_TH, down_grads, plan.down)


def _low(x_TH: Tensor, plan: BottleneckPlan, update: Update) -> Tensor:
    """Zero in rows without an adapter, and beyond a row's own rank: both activations keep zeros."""
    low_TW = x_TH.new_zeros(len(x_TH), plan.width)
    update(low_TW, x_TH, plan.down)
    return low_TW


def _active(low_TW: Tensor, plan: BottleneckPlan) -> Tensor:
    if plan.activations == {"relu"}:
        return F.relu(low_TW)
    gelu_TW = _gelu(low_TW)
    return gelu_TW if plan.activations == {"gelu"} else plan.choose(F.relu(low_TW), gelu_TW)


def _gelu(low_TW: Tensor) -> Tensor:
    """On a CPU rounded once from double: torch's own has another last digit in elements that fill no vector, so that a row's
    depend on how many rows there are.
    """
    return F.gelu(low_TW.double()).to(low_TW.dtype) if low_TW.device.type == "cpu" else F.gelu(low_TW)


def _gelu_backward(dactive_TW: Tensor, low_TW: Tensor) -> Tensor:
    wide = (dactive_TW.double(), low_TW.double()) if low_TW.device.type == "cpu" else (dactive_TW, low_TW)
    gelu_TW: Tensor = torch.ops.aten.gelu_backward(*wide)
    return gelu_TW.to(low_TW.dtype)


def _active_backward(dactive_TW: Tensor, low_TW: Tensor, plan: BottleneckPlan) -> Tensor:
    if plan.activations == {"relu"}:
        return _relu_backward(dactive_TW, low_TW)
    gelu_TW = _gelu_backward(dactive_TW, low_TW)
    return gelu_TW if plan.activations == {"gelu"} else plan.choose(_relu_backward(dactive_TW, low_TW), gelu_TW)


def _relu_backward(dactive_TW: Tensor, low_TW: Tensor) -> Tensor:
    return dactive_TW.masked_fill(low_TW <= 0, 0.0)


@functools.lru_cache(maxsize=64)
def _identity(rank: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The identity as [rank, width], and its transpose, each in one piece."""
    identity = torch.eye(rank, width, dtype=dtype, device=device)
    return identity, identity.mT.contiguous()


def _like_identities(plan: BottleneckPlan) -> list[tuple[Tensor, Tensor]]:
    """Room for the gradients of each segment's two identities, which nobody reads."""
    first = plan.segments[0].down_RH
    sizes = [segment.down_RH.shape[0] * plan.width for segment in plan.segments]
    parts = torch.split(first.new_zeros(2 * sum(sizes)), [size for size in sizes for _ in range(2)])
    return [
        (identity_RW.view(-1, plan.width), identity_WR.view(plan.width, -1))
        for identity_RW, identity_WR in zip(parts[::2], parts[1::2], strict=True)
    ]
