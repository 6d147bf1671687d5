"""One fused unit of the backward pass: windows of several sequences and jobs, all at the same layer. Knows no order of units.

The number of operations depends on neither windows nor adapters: frozen linears see the rows of all windows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import ops
from kernels.upload import upload
from services.executor.backward_cursor import BackwardWindow
from services.executor.bottlenecks import BASES, BottleneckRows
from services.executor.dropout import RowDropout
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder, KvCache
from services.executor.scales import BEFORE_SCALE, ScaledRows


class BackwardUnit:
    """Windows of one kind (BackwardCursor.kind); those of an adapter follow each other. W rows in all."""

    def __init__(self, decoder: Decoder, cache: KvCache, windows: Sequence[BackwardWindow]) -> None:
        self._decoder, self._cache, self._windows = decoder, cache, windows
        first = windows[0].cursor
        self._layer, self._last = first.layer, first.last_module
        self._kept = first.sequence.tape.kept(first.layer)
        self._adapters = _AdapterRows(windows)
        parts = [(window.cursor.sequence.dropout, window.start, window.end) for window in windows]
        self._dropout = RowDropout.joined(parts, decoder.device)

    def run(self) -> None:
        """Replace the windows' gradients by those of the layer's input, and add to the adapters' and to the accumulators."""
        dy_WH = self._joined(lambda window: window.cursor.sequence.dx_TH[window.start : window.end])
        dm_WH = self._mlp(dy_WH)
        if dm_WH is None or (dqkv_WO := self._attention(dm_WH)) is None:
            return
        if (dx_WH := self._projection(dqkv_WO)) is not None:
            parts = torch.split(dm_WH + dx_WH, [window.num_rows for window in self._windows])
            torch._foreach_copy_([window.cursor.sequence.dx_TH[window.start : window.end] for window in self._windows], parts)

    def _mlp(self, dy_WH: Tensor) -> Tensor | None:
        """Gradient of m, the MLP's residual input, from that of the layer's output m + down(silu(gate) * up)."""
        weights, linears = self._decoder.layers[self._layer], self._decoder.linears[self._layer]
        ddown_WH = self._before_bottleneck("down", self._before_scale("down", dy_WH))
        if self._last == "down":
            self._bypass("down", None, dy_WH, self._h)
            if self._adapters.scaled.vectors(self._layer, "down", is_input=True):
                self._input_scale("down", linears.down.backward(ddown_WH), self._h())
            return None
        gate_up = self._gate_up()
        dh_WF = linears.down.backward(ddown_WH)
        if self._adapters.scaled.vectors(self._layer, "down", is_input=True):
            dh_WF = self._input_scale("down", dh_WF, ops.silu_mul(gate_up))
        self._bypass("down", dh_WF, dy_WH, lambda: ops.silu_mul(gate_up))
        dgate_up = ops.silu_mul_backward(dh_WF, gate_up)
        dlinear_W2F = self._before_scale("gate_up", dgate_up)
        if self._last == "gate_up":
            self._bypass("gate_up", None, dgate_up, self._z)
            return None
        dz_WH = linears.gate_up.backward(dlinear_W2F)
        self._bypass("gate_up", dz_WH, dgate_up, self._z)
        return dy_WH + ops.rms_norm_backward(dz_WH, self._m(), weights.post_norm_H, self._decoder.config.rms_norm_eps)

    def _attention(self, dm_WH: Tensor) -> Tensor | None:
        """Gradient of the fused projection's output, before RoPE, from that of m = x + o(attention)."""
        decoder, config = self._decoder, self._decoder.config
        do_WH = self._before_bottleneck("o", self._before_scale("o", dm_WH))
        has_input_scale = bool(self._adapters.scaled.vectors(self._layer, "o", is_input=True))
        if self._last == "o":
            self._bypass("o", None, dm_WH, lambda: self._tape("out"))
            if has_input_scale:
                self._input_scale("o", decoder.linears[self._layer].o.backward(do_WH), self._tape("out"))
            return None
        dscaled_WO = decoder.linears[self._layer].o.backward(do_WH)
        dout_WO = self._adapters.scaled.scaled(self._layer, "o", dscaled_WO, is_input=True)
        # First the adapter's share of dout: what its own gradients need, out, comes with dq, dk and dv.
        self._bypass("o", dout_WO, dm_WH, None)
        positions = np.concatenate([np.arange(window.start, window.end) for window in self._windows])
        positions_W = upload([positions], decoder.device)[0]
        cos, sin = decoder.cos_PD[positions_W], decoder.sin_PD[positions_W]
        shape = (len(dm_WH), config.num_heads, config.head_dim)
        out_WND, dq_WND = ops.add_attention_gradients(
            dout_WO.view(shape),
            self._q(shape, cos, sin),
            self._cache.k[self._layer],
            self._cache.v[self._layer],
            self._attention_plan(),
            config.attention_scale,
            [(window.cursor.dk_TKD[: window.end], window.cursor.dv_TKD[: window.end]) for window in self._windows],
        )
        self._bypass("o", None, dm_WH, lambda: out_WND.flatten(1))
        if has_input_scale:
            self._input_scale("o", dscaled_WO, out_WND.flatten(1))
        dk_WKD, dv_WKD = self._final()
        dq_WND, dk_WKD = (ops.rope_backward(grad, cos, sin) for grad in (dq_WND, dk_WKD))
        return torch.cat([grad.flatten(1) for grad in (dq_WND, dk_WKD, dv_WKD)], dim=1)

    def _projection(self, dqkv_WO: Tensor) -> Tensor | None:
        """Gradient of the layer's input x through norm and projection."""
        norm_H, eps = self._decoder.layers[self._layer].input_norm_H, self._decoder.config.rms_norm_eps
        dlinear_WO = self._before_scale("qkv", dqkv_WO)
        if self._last == "qkv":
            self._bypass("qkv", None, dqkv_WO, lambda: self._normed("y", "x", norm_H))
            return None
        dy_WH = self._decoder.linears[self._layer].qkv.backward(dlinear_WO)
        self._bypass("qkv", dy_WH, dqkv_WO, lambda: self._normed("y", "x", norm_H))
        return ops.rms_norm_backward(dy_WH, self._tape("x"), norm_H, eps)

    # --- what windows bring ----------------------------------------------------------------------------------------

    def _joined(self, part: Callable[[BackwardWindow], Tensor]) -> Tensor:
        """A part of each window, one below the other."""
        parts = [part(window) for window in self._windows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tape(self, name: str) -> Tensor:
        """The windows' rows of a kept tensor."""
        return self._joined(lambda window: window.cursor.sequence.tape.rows(self._layer, name, window.start, window.end))

    def _normed(self, name: str, source: str, norm_H: Tensor) -> Tensor:
        """A norm's output, kept or made again from its input."""
        if name in self._kept:
            return self._tape(name)
        source_WH = self._m() if source == "m" else self._tape(source)
        return ops.rms_norm(source_WH, norm_H, self._decoder.config.rms_norm_eps)

    def _z(self) -> Tensor:
        return self._normed("z", "m", self._decoder.layers[self._layer].post_norm_H)

    def _m(self) -> Tensor:
        """The MLP's residual input, kept or made again from the layer's input and the attention's output."""
        if "m" in self._kept:
            return self._tape("m")
        o_WH = self._adapters.scaled.scaled(self._layer, "o", self._tape("o_base"), is_input=False)
        if (plan := self._adapters.bottlenecks.plan(self._layer, "o")) is not None:
            o_WH = o_WH.clone()
            ops.segmented_bottleneck(o_WH, self._dropped("o", o_WH), plan)
        return self._tape("x") + o_WH

    def _q(self, shape: tuple[int, int, int], cos_WD: Tensor, sin_WD: Tensor) -> Tensor:
        """Queries, kept or made again from what (IA)3 scales; RoPE is its own gradient's inverse."""
        if "q" in self._kept:
            return self._tape("q").view(shape)
        q_WO = self._tape("q_raw_base")
        sizes = self._decoder.config.qkv_sizes
        qkv_WO = torch.cat([q_WO, q_WO.new_zeros(len(q_WO), sizes[1] + sizes[2])], dim=1)
        scaled_WO = self._adapters.scaled.scaled(self._layer, "qkv", qkv_WO, is_input=False)
        return ops.rope_backward(scaled_WO[:, : sizes[0]].reshape(shape), cos_WD, -sin_WD)

    def _h(self) -> Tensor:
        return self._tape("h") if "h" in self._kept else ops.silu_mul(self._gate_up())

    def _gate_up(self) -> Tensor:
        """The MLP's gate and up, kept or made again."""
        if "gate_up" in self._kept:
            return self._tape("gate_up")
        if not {"gate", "up", "gate_base", "up_base"} & self._kept:
            gate_up = self._gate_up_linear()
            plan, _ = self._adapters.of(self._layer, "gate_up")
            if plan.segments:
                ops.segmented_lora(gate_up, self._dropped("gate_up", self._z()), plan)
            return self._adapters.scaled.scaled(self._layer, "gate_up", gate_up, is_input=False)
        names = [name if name in self._kept else f"{name}_base" for name in ("gate", "up")]
        whole = torch.cat([self._tape(name) for name in names], dim=1)
        scaled = self._adapters.scaled.scaled(self._layer, "gate_up", whole, is_input=False)
        width = whole.shape[1] // 2
        parts = [(whole if name in self._kept and not name.endswith("_base") else scaled) for name in names]
        return torch.cat([parts[0][:, :width], parts[1][:, width:]], dim=1)

    def _gate_up_linear(self) -> Tensor:
        return self._decoder.linears[self._layer].gate_up(self._z())

    def _before_scale(self, module: str, dy_WO: Tensor) -> Tensor:
        """Gradient of a linear's own output, from that of what (IA)3 makes of it; adds the vectors' gradients."""
        found = self._adapters.scaled.vectors(self._layer, module, is_input=False)
        if not found:
            return dy_WO
        base_WO = torch.zeros_like(dy_WO)
        again = None
        for target, columns in {scale.target: scale.columns for _, scale in found}.items():
            if BEFORE_SCALE[target] in self._kept:
                base_WO[:, columns] = self._tape(BEFORE_SCALE[target])
            else:
                again = self._gate_up_linear() if again is None else again
                base_WO[:, columns] = again[:, columns]
        self._adapters.add_scale_gradients(self._layer, module, dy_WO, base_WO, is_input=False)
        return self._adapters.scaled.scaled(self._layer, module, dy_WO, is_input=False)

    def _before_bottleneck(self, module: str, dy_WH: Tensor) -> Tensor:
        """Gradient of a linear's own output, from that of what bottleneck adapters make of it; adds their gradients."""
        rows = self._adapters.bottlenecks
        if rows.plan(self._layer, module) is None:
            return dy_WH
        share_WH = None if self._last == module else torch.zeros_like(dy_WH)
        base_WH = self._dropped(module, self._tape(BASES[module]))
        rows.add_gradients(self._layer, module, share_WH, dy_WH, base_WH, self._adapters.bottleneck_grads)
        return dy_WH if share_WH is None else dy_WH + self._dropped(module, share_WH)

    def _input_scale(self, module: str, dscaled_WI: Tensor, x_WI: Tensor) -> Tensor:
        """Gradient of a linear's input, from that of what (IA)3 makes of it; adds the vectors' gradients."""
        self._adapters.add_scale_gradients(self._layer, module, dscaled_WI, x_WI, is_input=True)
        return self._adapters.scaled.scaled(self._layer, module, dscaled_WI, is_input=True)

    def _attention_plan(self) -> ops.AttentionPlan:
        segments, start = [], 0
        for window in self._windows:
            slots_L = window.cursor.sequence.slots_T[: window.end]
            segments.append(ops.AttentionSegment(start=start, end=start + window.num_rows, slots_L=slots_L))
            start += window.num_rows
        return ops.AttentionPlan(segments)

    def _final(self) -> tuple[Tensor, Tensor]:
        """The gradients of the windows' own keys and values [W, K, D], to which all that see them have added by now."""
        dk_WKD = self._joined(lambda window: window.cursor.dk_TKD[window.start : window.end])
        dv_WKD = self._joined(lambda window: window.cursor.dv_TKD[window.start : window.end])
        return dk_WKD.to(self._decoder.dtype), dv_WKD.to(self._decoder.dtype)

    def _bypass(self, module: str, dx_WI: Tensor | None, dy_WO: Tensor, x_WI: Callable[[], Tensor] | None) -> None:
        """Backward of all adapters on a linear: their share is added to its input's gradient, with its input their own."""
        plan, grads = self._adapters.of(self._layer, module)
        if not plan.segments:
            return
        # Summed by themselves first, also without dropout: another job's dropout in the unit must not change the order.
        share_WI = None if dx_WI is None else torch.zeros_like(dx_WI)
        inputs_WI = None if x_WI is None else self._dropped(module, x_WI())
        ops.segmented_lora_gradients(share_WI, dy_WO, inputs_WI, None if x_WI is None else grads, plan)
        if share_WI is not None and dx_WI is not None:
            dx_WI.add_(self._dropped(module, share_WI))

    def _dropped(self, module: str, x_WI: Tensor) -> Tensor:
        """A linear's input as its adapters see it, or the gradient that comes back from them, without what dropout drops."""
        return x_WI if self._dropout is None else self._dropout.drop(self._layer, module, x_WI)


class _AdapterRows:
    """Which rows of a unit have which adapter; neighbours with the same one are one segment.

    Sums over an adapter's rows take a window's later rows first, as windows come: so the sum of a step is one over its
    sequences in their order, each from right to left, however time cuts them into windows and gathers them in units.
    """

    def __init__(self, windows: Sequence[BackwardWindow]) -> None:
        self._rows: list[tuple[int, int, LoraAdapter, LoraWeights]] = []
        self._masks: dict[object, object] = {}
        start = 0
        for window in windows:
            cursor, end = window.cursor, start + window.num_rows
            if self._rows and self._rows[-1][2] is cursor.adapter:
                start = self._rows.pop()[0]
            self._rows.append((start, end, cursor.adapter, cursor.grads))
            start = end
        ends = np.cumsum([window.num_rows for window in windows])
        order = [np.arange(end - 1, end - window.num_rows - 1, -1) for window, end in zip(windows, ends, strict=True)]
        device = windows[0].cursor.sequence.dx_TH.device
        self._order_W = upload([np.concatenate(order)], device)[0]
        self.scaled = ScaledRows([(start, end, adapter.weights) for start, end, adapter, _ in self._rows])
        self.bottlenecks = BottleneckRows(
            [(start, end, adapter) for start, end, adapter, _ in self._rows], self._masks, self._order_W
        )
        self.bottleneck_grads = [grads for *_, adapter, grads in self._rows if adapter.weights.bottlenecks]

    def of(self, layer: int, module: str) -> tuple[ops.LoraPlan, list[tuple[Tensor, Tensor]]]:
        """The segments of a linear and, for each, where its gradients are summed."""
        segments = [s for start, end, adapter, _ in self._rows for s in adapter.segments(layer, module, start, end)]
        grads = [(g.a_RI, g.b_OR) for *_, grads in self._rows for g in grads.linears.get((layer, module), ())]
        return ops.LoraPlan(segments, self._masks, self._order_W), grads

    def add_scale_gradients(self, layer: int, module: str, dy_WC: Tensor, x_WC: Tensor, *, is_input: bool) -> None:
        """Add the gradients of (IA)3's vectors."""
        grads = [grads for *_, adapter, grads in self._rows if adapter.weights.scales]
        self.scaled.add_gradients(layer, module, dy_WC, x_WC, grads, self._order_W, is_input=is_input)
