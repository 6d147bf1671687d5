"""The backward pass of one training sequence, resumable after any (layer, window). Knows no loss, job or optimizer.

Layers run from the top, windows inside a layer from the right: key j is seen by queries i >= j only, so once a window is
reached all later queries have added their share to its key and value gradients, and its own share makes them final.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.activation_plan import MAX_WINDOW_TOKENS
from kernels import ops
from services.executor.lora import MODULES, LoraAdapter, LoraWeights
from services.executor.model import Decoder, KvCache
from services.executor.training_sequence import TrainingSequence


class BackwardPass:
    """Adds the sequence's gradients of the adapter to `grads`, from its gradient at the top, `dx_TH`, which it overwrites."""

    def __init__(
        self, decoder: Decoder, cache: KvCache, adapter: LoraAdapter, grads: LoraWeights, sequence: TrainingSequence
    ) -> None:
        self._decoder, self._cache = decoder, cache
        self._adapter, self._grads = adapter, grads
        self._tape, self._slots_T, self._dx_TH = sequence.tape, sequence.slots_T, sequence.dx_TH
        self._dropout = sequence.dropout
        self._num_rows = sequence.num_rows
        self._lowest = min(adapter.layers) if self._num_rows else decoder.config.num_layers
        self._layer = decoder.config.num_layers - 1
        self._end = self._num_rows
        config = decoder.config
        shape = (self._num_rows, config.num_kv_heads, config.head_dim)
        wide = torch.promote_types(decoder.dtype, torch.float32)
        self._dk_TKD = torch.zeros(shape, dtype=wide, device=decoder.device)
        self._dv_TKD = torch.zeros(shape, dtype=wide, device=decoder.device)

    @property
    def is_done(self) -> bool:
        """Whether the lowest adapted layer is finished; below it nothing is trained."""
        return self._layer < self._lowest

    @property
    def remaining_token_layers(self) -> int:
        """Work left, in tokens times layers."""
        return 0 if self.is_done else self._end + (self._layer - self._lowest) * self._num_rows

    @property
    def accumulator_bytes(self) -> int:
        """Memory of the key and value gradients."""
        return self._dk_TKD.nbytes + self._dv_TKD.nbytes

    def advance(self, max_token_layers: int) -> int:
        """Do up to this much work (tokens times layers); returns what was done."""
        budget = max_token_layers
        while budget > 0 and not self.is_done:
            start = max(self._end - min(MAX_WINDOW_TOKENS, budget), 0)
            self._window(self._layer, start, self._end)
            budget -= self._end - start
            self._end = start
            if start == 0:
                self._leave_layer()
        return max_token_layers - budget

    def _leave_layer(self) -> None:
        self._tape.drop(self._layer)
        self._dk_TKD.zero_()
        self._dv_TKD.zero_()
        self._layer -= 1
        self._end = self._num_rows

    def _window(self, layer: int, start: int, end: int) -> None:
        dm_WH = self._mlp(layer, start, end, self._dx_TH[start:end])
        if dm_WH is None or (dqkv_WO := self._attention(layer, start, end, dm_WH)) is None:
            return
        dy_WH = self._projection(layer, start, end, dqkv_WO)
        if dy_WH is not None:
            self._dx_TH[start:end] = dm_WH + dy_WH

    def _ends_at(self, layer: int, module: str) -> bool:
        """Whether nothing below this linear is trained: then its own weights are the last that get a gradient."""
        return layer == self._lowest and module == next(name for name in MODULES if self._adapter.has(layer, name))

    def _mlp(self, layer: int, start: int, end: int, dy_WH: Tensor) -> Tensor | None:
        """Gradient of m, the MLP's residual input, from that of the layer's output m + down(silu(gate) * up)."""
        weights, linears, eps = self._decoder.layers[layer], self._decoder.linears[layer], self._decoder.config.rms_norm_eps
        if self._tape.has(layer, "h"):
            self._weight_backward(layer, "down", start, dy_WH, self._tape.rows(layer, "h", start, end))
            return None
        gate_up = self._gate_up(layer, start, end)
        if self._adapter.has(layer, "down"):
            self._weight_backward(layer, "down", start, dy_WH, ops.silu_mul(gate_up))
        if self._ends_at(layer, "down"):
            return None
        dh_WF = linears.down.backward(dy_WH)
        self._input_backward(layer, "down", start, dh_WF, self._wide(dy_WH))
        dgate_up = ops.silu_mul_backward(dh_WF, gate_up)
        if self._adapter.has(layer, "gate_up"):
            z_WH = self._normed(layer, "z", "m", weights.post_norm_H, start, end)
            self._weight_backward(layer, "gate_up", start, dgate_up, z_WH)
        if self._ends_at(layer, "gate_up"):
            return None
        dz_WH = linears.gate_up.backward(dgate_up)
        self._input_backward(layer, "gate_up", start, dz_WH, self._wide(dgate_up))
        return dy_WH + ops.rms_norm_backward(dz_WH, self._tape.rows(layer, "m", start, end), weights.post_norm_H, eps)

    def _attention(self, layer: int, start: int, end: int, dm_WH: Tensor) -> Tensor | None:
        """Gradient of the fused projection's output, before RoPE, from that of m = x + o(attention)."""
        decoder, config = self._decoder, self._decoder.config
        if self._ends_at(layer, "o"):
            self._weight_backward(layer, "o", start, dm_WH, self._tape.rows(layer, "out", start, end))
            return None
        slots = self._slots_T[:end]
        dout_WO = decoder.linears[layer].o.backward(dm_WH)
        self._input_backward(layer, "o", start, dout_WO, dm_WH)
        shape = (end - start, config.num_heads, config.head_dim)
        out_WND, dq_WND, dk_LKD, dv_LKD = ops.window_attention_backward(
            dout_WO.view(shape),
            self._tape.rows(layer, "q", start, end).view(shape),
            self._cache.k[layer].index_select(0, slots),
            self._cache.v[layer].index_select(0, slots),
            start,
            config.attention_scale,
        )
        self._weight_backward(layer, "o", start, dm_WH, out_WND.flatten(1))
        self._dk_TKD[:end] += dk_LKD
        self._dv_TKD[:end] += dv_LKD
        cos, sin = decoder.cos_PD[start:end], decoder.sin_PD[start:end]
        dq_WND = ops.rope_backward(dq_WND, cos, sin)
        dk_WKD = ops.rope_backward(self._dk_TKD[start:end].to(decoder.dtype), cos, sin)
        dv_WKD = self._dv_TKD[start:end].to(decoder.dtype)
        return torch.cat([grad.flatten(1) for grad in (dq_WND, dk_WKD, dv_WKD)], dim=1)

    def _projection(self, layer: int, start: int, end: int, dqkv_WO: Tensor) -> Tensor | None:
        """Gradient of the layer's input x through norm and projection."""
        weights, eps = self._decoder.layers[layer], self._decoder.config.rms_norm_eps
        if self._adapter.has(layer, "qkv"):
            y_WH = self._normed(layer, "y", "x", weights.input_norm_H, start, end)
            self._weight_backward(layer, "qkv", start, dqkv_WO, y_WH)
        if self._ends_at(layer, "qkv"):
            return None
        dy_WH = self._decoder.linears[layer].qkv.backward(dqkv_WO)
        self._input_backward(layer, "qkv", start, dy_WH, self._wide(dqkv_WO))
        return ops.rms_norm_backward(dy_WH, self._tape.rows(layer, "x", start, end), weights.input_norm_H, eps)

    def _gate_up(self, layer: int, start: int, end: int) -> Tensor:
        """The MLP's gate and up, kept or made again."""
        if self._tape.has(layer, "gate_up"):
            return self._tape.rows(layer, "gate_up", start, end)
        z_WH = self._normed(layer, "z", "m", self._decoder.layers[layer].post_norm_H, start, end)
        gate_up = self._decoder.linears[layer].gate_up(z_WH)
        self._adapter.apply(layer, "gate_up", gate_up, self._kept(layer, "gate_up", start, z_WH))
        return gate_up

    def _normed(self, layer: int, name: str, source: str, norm_H: Tensor, start: int, end: int) -> Tensor:
        """A norm's output, kept or made again from its input."""
        if self._tape.has(layer, name):
            return self._tape.rows(layer, name, start, end)
        return ops.rms_norm(self._tape.rows(layer, source, start, end), norm_H, self._decoder.config.rms_norm_eps)

    def _wide(self, dy_WO: Tensor) -> Tensor:
        return dy_WO.to(self._grads.flat.dtype)

    def _kept(self, layer: int, module: str, start: int, x_WI: Tensor) -> Tensor:
        """An adapter's input, or its gradient, without what dropout drops."""
        return x_WI if self._dropout is None else self._dropout.drop(layer, module, x_WI, start)

    def _input_backward(self, layer: int, module: str, start: int, dx_WI: Tensor, dy_WO: Tensor) -> None:
        """Add the adapter's share of the gradient of a linear's input."""
        if self._dropout is None:
            self._adapter.backward(layer, module, dx_WI, dy_WO)
            return
        share_WI = torch.zeros_like(dx_WI, dtype=self._grads.flat.dtype)
        self._adapter.backward(layer, module, share_WI, dy_WO)
        dx_WI.add_(self._dropout.drop(layer, module, share_WI, start))

    def _weight_backward(self, layer: int, module: str, start: int, dy_WO: Tensor, x_WI: Tensor) -> None:
        self._adapter.weight_backward(self._grads, layer, module, self._wide(dy_WO), self._kept(layer, module, start, x_WI))
