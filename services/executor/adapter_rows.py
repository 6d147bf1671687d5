"""Which rows of a batch have which adapter, arranged once for all layers. Knows rows and adapters, not requests."""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor

from kernels import ops
from services.executor.adapter_spec import MODULES, target_widths
from services.executor.bottlenecks import BottleneckRows
from services.executor.lora import LoraAdapter, Scale
from services.executor.model_config import ModelConfig
from services.executor.scales import ScaledRows

LINEARS = tuple(MODULES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterRows:
    """Rows [start, end) of the batch share an adapter."""

    start: int
    end: int
    adapter: LoraAdapter


class AdapterPlan:
    """The updates of all adapters of a batch: as many operations per fused linear, however many there are."""

    def __init__(self, rows: tuple[AdapterRows, ...]) -> None:
        self.rows = rows
        self._linears: dict[tuple[int, str], ops.LoraPlan] = {}
        self._masks: dict[object, object] = {}
        self._stacked: ops.LayersLora | None = None
        self._tables: ops.BatchTables | None = None
        self._scaled = ScaledRows([(entry.start, entry.end, entry.adapter.weights) for entry in rows])
        self._bottlenecks = BottleneckRows([(entry.start, entry.end, entry.adapter) for entry in rows], self._masks)

    @property
    def is_stackable(self) -> bool:
        """Whether the updates can be made in the same operation as the layers."""
        return all(rows.adapter.is_native for rows in self.rows)

    def stacked(self, config: ModelConfig) -> ops.LayersLora | None:
        """All updates of all layers, for the operation that runs these; None without adapters."""
        if self._stacked is None and self.rows:
            tables = [(rows.start, rows.end, rows.adapter.table(config)) for rows in self.rows]
            self._stacked = ops.LayersLora(tables, target_widths(config))
        return self._stacked

    def apply(self, layer: int, module: str, y_TO: Tensor, x_TI: Tensor) -> None:
        """Add each adapter's update to its rows of `y_TO`, in place."""
        if not self.rows:
            return
        if ops.uses_triton(y_TO):
            if self._tables is None:
                self._tables = ops.BatchTables([(rows.start, rows.end, rows.adapter.matrices()) for rows in self.rows])
            ops.batched_lora(y_TO, x_TI, self._tables, layer, LINEARS.index(module))
        else:
            self._apply_plan(layer, module, y_TO, x_TI)
        if (factors_TO := self._scaled.factors(layer, module, y_TO, is_input=False)) is not None:
            y_TO.mul_(factors_TO)

    def _apply_plan(self, layer: int, module: str, y_TO: Tensor, x_TI: Tensor) -> None:
        plan = self._linears.get((layer, module))
        if plan is None:
            segments = [s for rows in self.rows for s in rows.adapter.segments(layer, module, rows.start, rows.end)]
            plan = self._linears[layer, module] = ops.LoraPlan(segments, self._masks)
        if plan.segments:
            ops.segmented_lora(y_TO, x_TI, plan)

    def scaled_input(self, layer: int, module: str, x_TI: Tensor) -> Tensor:
        """A linear's input, times (IA)3's vectors on the rows of those adapters that scale it."""
        return self._scaled.scaled(layer, module, x_TI, is_input=True)

    def bottleneck(self, layer: int, module: str) -> ops.BottleneckPlan | None:
        """The bottleneck adapters that follow this linear on any row; None if there are none."""
        return self._bottlenecks.plan(layer, module)

    def output_scales(self, layer: int, module: str) -> list[Scale]:
        """Of any adapter, the vectors that multiply outputs of this linear."""
        return [scale for _, scale in self._scaled.vectors(layer, module, is_input=False)]


@functools.lru_cache(maxsize=2)
def arranged(rows: tuple[AdapterRows, ...]) -> AdapterPlan:
    """The plan of these rows; sequences that decode side by side have the same rows in pass after pass.

    Two plans are kept, and with them the adapters in them.
    """
    return AdapterPlan(rows)


def joined(rows: list[AdapterRows], new: AdapterRows) -> list[AdapterRows]:
    """The rows and new ones behind them; neighbours with the same adapter become one."""
    if rows and rows[-1].adapter is new.adapter and rows[-1].end == new.start:
        return [*rows[:-1], AdapterRows(start=rows[-1].start, end=new.end, adapter=new.adapter)]
    return [*rows, new]
