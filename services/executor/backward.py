"""The backward pass of one training sequence, resumable after any (layer, window). Knows no loss, job or optimizer.

Layers run from the top, windows inside a layer from the right: key j is seen by queries i >= j only, so once a window is
reached all later queries have added their share to its key and value gradients, and its own share makes them final.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import ops
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder, KvCache
from services.executor.training_sequence import TrainingSequence

MAX_WINDOW_TOKENS = 256


class BackwardPass:
    """Adds the sequence's gradients of the adapter to `grads`, from its gradient at the top, `dx_TH`, which it overwrites."""

    def __init__(
        self, decoder: Decoder, cache: KvCache, adapter: LoraAdapter, grads: LoraWeights, sequence: TrainingSequence
    ) -> None:
        self._decoder, self._cache = decoder, cache
        self._adapter, self._grads = adapter, grads
        self._tape, self._slots_T, self._dx_TH = sequence.tape, sequence.slots_T, sequence.dx_TH
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
        is_lowest = layer == self._lowest
        dm_WH = self._mlp(layer, start, end, self._dx_TH[start:end])
        if is_lowest and not (self._adapter.has(layer, "qkv") or self._adapter.has(layer, "o")):
            return
        dqkv_WO = self._attention(layer, start, end, dm_WH)
        self._dx_TH[start:end] = dm_WH + self._projection(layer, start, end, dqkv_WO)

    def _mlp(self, layer: int, start: int, end: int, dy_WH: Tensor) -> Tensor:
        """Gradient of m, the MLP's residual input, from that of the layer's output m + down(silu(gate) * up)."""
        weights, linears, eps = self._decoder.layers[layer], self._decoder.linears[layer], self._decoder.config.rms_norm_eps
        m_WH, gate_up = (self._tape.rows(layer, name, start, end) for name in ("m", "gate_up"))
        dh_WF = linears.down.backward(dy_WH)
        self._linear_backward(layer, "down", dh_WF, dy_WH, ops.silu_mul(gate_up))
        dgate_up = ops.silu_mul_backward(dh_WF, gate_up)
        dz_WH = linears.gate_up.backward(dgate_up)
        self._linear_backward(layer, "gate_up", dz_WH, dgate_up, ops.rms_norm(m_WH, weights.post_norm_H, eps))
        return dy_WH + ops.rms_norm_backward(dz_WH, m_WH, weights.post_norm_H, eps)

    def _attention(self, layer: int, start: int, end: int, dm_WH: Tensor) -> Tensor:
        """Gradient of the fused projection's output, before RoPE, from that of m = x + o(attention)."""
        decoder, config = self._decoder, self._decoder.config
        slots = self._slots_T[:end]
        dout_WO = decoder.linears[layer].o.backward(dm_WH)
        self._adapter.backward(layer, "o", dout_WO, dm_WH)
        out_WND, dq_WND, dk_LKD, dv_LKD = ops.window_attention_backward(
            dout_WO.view(end - start, config.num_heads, config.head_dim),
            self._tape.rows(layer, "q", start, end),
            self._cache.k[layer].index_select(0, slots),
            self._cache.v[layer].index_select(0, slots),
            start,
            config.attention_scale,
        )
        self._adapter.weight_backward(self._grads, layer, "o", dm_WH, out_WND.flatten(1))
        self._dk_TKD[:end] += dk_LKD
        self._dv_TKD[:end] += dv_LKD
        cos, sin = decoder.cos_PD[start:end], decoder.sin_PD[start:end]
        dq_WND = ops.rope_backward(dq_WND, cos, sin)
        dk_WKD = ops.rope_backward(self._dk_TKD[start:end].to(decoder.dtype), cos, sin)
        dv_WKD = self._dv_TKD[start:end].to(decoder.dtype)
        return torch.cat([grad.flatten(1) for grad in (dq_WND, dk_WKD, dv_WKD)], dim=1)

    def _projection(self, layer: int, start: int, end: int, dqkv_WO: Tensor) -> Tensor:
        """Gradient of the layer's input x through norm and projection."""
        weights, eps = self._decoder.layers[layer], self._decoder.config.rms_norm_eps
        x_WH = self._tape.rows(layer, "x", start, end)
        y_WH = ops.rms_norm(x_WH, weights.input_norm_H, eps)
        if layer == self._lowest:
            self._adapter.weight_backward(self._grads, layer, "qkv", dqkv_WO, y_WH)
            return torch.zeros_like(x_WH)
        dy_WH = self._decoder.linears[layer].qkv.backward(dqkv_WO)
        self._linear_backward(layer, "qkv", dy_WH, dqkv_WO, y_WH)
        return ops.rms_norm_backward(dy_WH, x_WH, weights.input_norm_H, eps)

    def _linear_backward(self, layer: int, module: str, dx_WI: Tensor, dy_WO: Tensor, x_WI: Tensor) -> None:
        dy_WO = dy_WO.to(self._grads.flat.dtype)
        self._adapter.backward(layer, module, dx_WI, dy_WO)
        self._adapter.weight_backward(self._grads, layer, module, dy_WO, x_WI)
