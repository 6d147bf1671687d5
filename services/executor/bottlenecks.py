"""Bottleneck adapters on the rows of a batch: whose rows, forward and backward. Knows neither layers' order nor jobs.

As many operations for many adapters as for one: one plan for each linear that any of them follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from kernels import ops
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.scales import BEFORE_SCALE

BASES = {module: BEFORE_SCALE[f"{module}_proj"] for module in ("o", "down")}
"""What activation plans call the output of the linear that a bottleneck adapter reads."""


class BottleneckRows:
    """Rows [start, end) with these adapters each; rows of adapters that have no bottleneck stay as they are."""

    def __init__(
        self,
        rows: Sequence[tuple[int, int, LoraAdapter]],
        masks: dict[object, object] | None = None,
        order_T: Tensor | None = None,
    ) -> None:
        self._rows = [entry for entry in rows if entry[2].weights.bottlenecks]
        self._masks = {} if masks is None else masks
        self._order_T = order_T
        self._plans: dict[tuple[int, str], ops.BottleneckPlan | None] = {}

    def plan(self, layer: int, module: str) -> ops.BottleneckPlan | None:
        """Of the adapters behind a linear; None if there are none."""
        if not self._rows:
            return None
        if (layer, module) not in self._plans:
            segments = [
                ops.BottleneckSegment(
                    start=start, end=end, down_RH=found.down_RH, up_HR=found.up_HR, scale=adapter.scale,
                    activation=_activation(adapter),
                )
                for start, end, adapter in self._rows
                if (found := adapter.weights.bottlenecks.get((layer, module))) is not None
            ]  # fmt: skip
            self._plans[layer, module] = ops.BottleneckPlan(segments, self._masks, self._order_T) if segments else None
        return self._plans[layer, module]

    def add_gradients(
        self, layer: int, module: str, dx_TH: Tensor | None, dy_TH: Tensor, x_TH: Tensor, grads: Sequence[LoraWeights]
    ) -> None:
        """Add the gradient of the plan's input x to dx, if there is one, and the matrices' to each rows' `grads`."""
        plan = self.plan(layer, module)
        if plan is None:
            return
        found = [weights.bottlenecks[layer, module] for weights in grads if (layer, module) in weights.bottlenecks]
        ops.segmented_bottleneck_gradients(dx_TH, dy_TH, x_TH, found, plan)


def _activation(adapter: LoraAdapter) -> Literal["relu", "gelu"]:
    assert adapter.spec.non_linearity, "the specification was checked"
    return adapter.spec.non_linearity
