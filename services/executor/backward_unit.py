"""One fused unit of the backward pass: windows of several sequences and jobs, all at the same layer. Knows no order of units.

The number of operations depends on neither windows nor adapters: frozen linears see the rows of all windows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import ops
from services.executor.backward_cursor import BackwardWindow
from services.executor.dropout import RowDropout
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder, KvCache


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
        if "h" in self._kept:
            self._bypass("down", None, dy_WH, lambda: self._tape("h"))
            return None
        gate_up = self._gate_up()
        if self._last == "down":
            self._bypass("down", None, dy_WH, lambda: ops.silu_mul(gate_up))
            return None
        dh_WF = linears.down.backward(dy_WH)
        self._bypass("down", dh_WF, dy_WH, lambda: ops.silu_mul(gate_up))
        dgate_up = ops.silu_mul_backward(dh_WF, gate_up)
        if self._last == "gate_up":
            self._bypass("gate_up", None, dgate_up, lambda: self._normed("z", "m", weights.post_norm_H))
            return None
        dz_WH = linears.gate_up.backward(dgate_up)
        self._bypass("gate_up", dz_WH, dgate_up, lambda: self._normed("z", "m", weights.post_norm_H))
        return dy_WH + ops.rms_norm_backward(dz_WH, self._tape("m"), weights.post_norm_H, self._decoder.config.rms_norm_eps)

    def _attention(self, dm_WH: Tensor) -> Tensor | None:
        """Gradient of the fused projection's output, before RoPE, from that of m = x + o(attention)."""
        decoder, config = self._decoder, self._decoder.config
        if self._last == "o":
            self._bypass("o", None, dm_WH, lambda: self._tape("out"))
            return None
        dout_WO = decoder.linears[self._layer].o.backward(dm_WH)
        # First the adapter's share of dout: what its own gradients need, out, comes with dq, dk and dv.
        self._bypass("o", dout_WO, dm_WH, None)
        shape = (len(dm_WH), config.num_heads, config.head_dim)
        out_WND, dq_WND, dk_LKD, dv_LKD = ops.ragged_attention_backward(
            dout_WO.view(shape),
            self._tape("q").view(shape),
            self._cache.k[self._layer],
            self._cache.v[self._layer],
            self._attention_plan(),
            config.attention_scale,
        )
        self._bypass("o", None, dm_WH, lambda: out_WND.flatten(1))
        dk_WKD, dv_WKD = self._accumulated(dk_LKD, dv_LKD)
        positions = np.concatenate([np.arange(window.start, window.end) for window in self._windows])
        positions_W = torch.from_numpy(positions).to(decoder.device)
        cos, sin = decoder.cos_PD[positions_W], decoder.sin_PD[positions_W]
        dq_WND, dk_WKD = (ops.rope_backward(grad, cos, sin) for grad in (dq_WND, dk_WKD))
        return torch.cat([grad.flatten(1) for grad in (dq_WND, dk_WKD, dv_WKD)], dim=1)

    def _projection(self, dqkv_WO: Tensor) -> Tensor | None:
        """Gradient of the layer's input x through norm and projection."""
        norm_H, eps = self._decoder.layers[self._layer].input_norm_H, self._decoder.config.rms_norm_eps
        if self._last == "qkv":
            self._bypass("qkv", None, dqkv_WO, lambda: self._normed("y", "x", norm_H))
            return None
        dy_WH = self._decoder.linears[self._layer].qkv.backward(dqkv_WO)
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
        return ops.rms_norm(self._tape(source), norm_H, self._decoder.config.rms_norm_eps)

    def _gate_up(self) -> Tensor:
        """The MLP's gate and up, kept or made again."""
        if "gate_up" in self._kept:
            return self._tape("gate_up")
        z_WH = self._normed("z", "m", self._decoder.layers[self._layer].post_norm_H)
        gate_up = self._decoder.linears[self._layer].gate_up(z_WH)
        plan, _ = self._adapters.of(self._layer, "gate_up")
        if plan.segments:
            ops.segmented_lora(gate_up, self._dropped("gate_up", z_WH), plan)
        return gate_up

    def _attention_plan(self) -> ops.AttentionPlan:
        segments, start = [], 0
        for window in self._windows:
            slots_L = window.cursor.sequence.slots_T[: window.end]
            segments.append(ops.AttentionSegment(start=start, end=start + window.num_rows, slots_L=slots_L))
            start += window.num_rows
        return ops.AttentionPlan(segments)

    def _accumulated(self, dk_LKD: Tensor, dv_LKD: Tensor) -> tuple[Tensor, Tensor]:
        """The final gradients of the windows' own keys and values [W, K, D]; those of keys before them are added up."""
        num_keys = [window.end for window in self._windows]
        places = [window.cursor.dk_TKD[: window.end] for window in self._windows]
        places += [window.cursor.dv_TKD[: window.end] for window in self._windows]
        torch._foreach_add_(places, [*torch.split(dk_LKD, num_keys), *torch.split(dv_LKD, num_keys)])
        dk_WKD = self._joined(lambda window: window.cursor.dk_TKD[window.start : window.end])
        dv_WKD = self._joined(lambda window: window.cursor.dv_TKD[window.start : window.end])
        return dk_WKD.to(self._decoder.dtype), dv_WKD.to(self._decoder.dtype)

    def _bypass(self, module: str, dx_WI: Tensor | None, dy_WO: Tensor, x_WI: Callable[[], Tensor] | None) -> None:
        """Backward of all adapters on a linear: their share is added to its input's gradient, with its input their own."""
        plan, grads = self._adapters.of(self._layer, module)
        if not plan.segments:
            return
        share_WI = dx_WI if dx_WI is None or self._dropout is None else torch.zeros_like(dx_WI)
        inputs_WI = None if x_WI is None else self._dropped(module, x_WI())
        ops.segmented_lora_gradients(share_WI, dy_WO, inputs_WI, None if x_WI is None else grads, plan)
        if share_WI is not None and dx_WI is not None and share_WI is not dx_WI:
            dx_WI.add_(self._dropped(module, share_WI))

    def _dropped(self, module: str, x_WI: Tensor) -> Tensor:
        """A linear's input as its adapters see it, or the gradient that comes back from them, without what dropout drops."""
        return x_WI if self._dropout is None else self._dropout.drop(self._layer, module, x_WI)


class _AdapterRows:
    """Which rows of a unit have which adapter; neighbours with the same one are one segment."""

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

    def of(self, layer: int, module: str) -> tuple[ops.LoraPlan, list[tuple[Tensor, Tensor]]]:
        """The segments of a linear and, for each, where its gradients are summed."""
        segments = [s for start, end, adapter, _ in self._rows for s in adapter.segments(layer, module, start, end)]
        grads = [(g.a_RI, g.b_OR) for *_, grads in self._rows for g in grads.linears.get((layer, module), ())]
        return ops.LoraPlan(segments, self._masks), grads
