"""The decoder: weights and one forward pass over a ragged batch. Knows tensors, not requests.

Shapes: T rows of the batch, H hidden, N query heads, K kv heads, D head_dim, S cache slots, F intermediate, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops
from services.executor.batch import Batch
from services.executor.features import PassFeatures
from services.executor.model_config import ModelConfig
from services.executor.rope import rotary_tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorms:
    """Weights of the norms of one layer."""

    input_norm_H: Tensor
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    post_norm_H: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Weights of one layer; q, k, v and gate, up are fused row-wise into one matrix each."""

    norms: LayerNorms
    qkv_OH: Tensor
    qkv_bias_O: Tensor | None
    o_HO: Tensor
    o_bias_H: Tensor | None
    gate_up_2FH: Tensor
    down_HF: Tensor


class Linears:
    """The projections of one layer, ready to run."""

    def __init__(self, weights: LayerWeights) -> None:
        self.qkv = ops.Linear(weights.qkv_OH, weights.qkv_bias_O)
        self.o = ops.Linear(weights.o_HO, weights.o_bias_H)
        self.gate_up = ops.Linear(weights.gate_up_2FH)
        self.down = ops.Linear(weights.down_HF)


class KvCache:
    """Keys and values of all pages: per layer [S, K, D]; slot = page * page_size + offset."""

    @staticmethod
    def num_bytes(config: ModelConfig, num_slots: int, dtype: torch.dtype) -> int:
        """Size of a cache, before there is one."""
        return 2 * config.num_layers * num_slots * config.num_kv_heads * config.head_dim * dtype.itemsize

    def __init__(self, config: ModelConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_layers, num_slots, config.num_kv_heads, config.head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self.k = list(self._keys)
        self.v = list(self._values)

    def move(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Copy whole rows of all layers: cache[dst] = cache[src]."""
        ops.commit_kv(self.k, self.v, src_slots, dst_slots)


class Decoder:
    """A pre-norm decoder of the Llama family.

    Layers are taken one by one: the plain weights of a linear that keeps another layout are let go before the next are loaded.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding_VH: Tensor,
        layers: Iterable[LayerWeights],
        final_norm_H: Tensor,
        lm_head_VH: Tensor,
    ) -> None:
        self.config = config
        self.embedding_VH = embedding_VH
        self.layers: list[LayerNorms] = []
        self.linears: list[Linears] = []
        for weights in layers:
            self.layers.append(weights.norms)
            self.linears.append(Linears(weights))
        self.final_norm_H = final_norm_H
        self.dtype = embedding_VH.dtype
        self.device = embedding_VH.device
        self.head = ops.Linear(lm_head_VH)
        self.cos_PD, self.sin_PD = rotary_tables(
            config.rope, config.head_dim, config.max_position_embeddings, self.dtype, self.device
        )
        self.stack = ops.layer_stack([self._parts(layer) for layer in range(config.num_layers)], _stack_shape(config))
        """The layers as one operation; None where there is none."""

    def _parts(self, layer: int) -> ops.LayerParts:
        norms, linears = self.layers[layer], self.linears[layer]
        return ops.LayerParts(
            input_norm_H=norms.input_norm_H,
            qkv=linears.qkv,
            q_norm_D=norms.q_norm_D,
            k_norm_D=norms.k_norm_D,
            o=linears.o,
            post_norm_H=norms.post_norm_H,
            gate_up=linears.gate_up,
            down=linears.down,
            window=self.config.windows[layer],
        )

    def forward(self, batch: Batch, cache: KvCache, features: PassFeatures | None = None) -> Tensor:
        """Hidden states [T, H] of all rows after the last layer, before the final norm.

        In place: writes keys and values of the rows into `cache`, and activations of training rows into their tapes. `features`
        gets the states after all layers but the last.
        """
        x_TH = F.embedding(batch.tokens_T, self.embedding_VH)
        cos_TD, sin_TD = self.cos_PD[batch.positions_T], self.sin_PD[batch.positions_T]
        if self.stack is not None and not batch.training and batch.adapters.is_stackable:
            lora = batch.adapters.stacked(self.config)
            kept = {} if features is None else features.room(x_TH, self.config.num_layers)
            return self.stack(x_TH, cos_TD, sin_TD, batch.slots_T, cache.k, cache.v, batch.attention, lora, kept)
        y_TH = ops.rms_norm(x_TH, self.layers[0].input_norm_H, self.config.rms_norm_eps)
        for layer in range(self.config.num_layers):
            m_TH, down_TH = self._layer(layer, x_TH, y_TH, cos_TD, sin_TD, batch, cache)
            if layer + 1 < self.config.num_layers:
                norm_H = self.layers[layer + 1].input_norm_H
                x_TH, y_TH = ops.add_rms_norm(m_TH, down_TH, norm_H, self.config.rms_norm_eps)
                if features is not None:
                    features.keep(layer + 1, x_TH)
        return m_TH + down_TH

    def layer(self, layer: int, x_TH: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        """Hidden states [T, H] behind one layer, from those before it; writes keys, values and tapes as `forward` does."""
        y_TH = ops.rms_norm(x_TH, self.layers[layer].input_norm_H, self.config.rms_norm_eps)
        cos_TD, sin_TD = self.cos_PD[batch.positions_T], self.sin_PD[batch.positions_T]
        m_TH, down_TH = self._layer(layer, x_TH, y_TH, cos_TD, sin_TD, batch, cache)
        return m_TH + down_TH

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits [R, V] of hidden states that `forward` returned."""
        normed = ops.rms_norm(hidden_RH, self.final_norm_H, self.config.rms_norm_eps)
        return self.head(normed)

    def _layer(
        self, layer: int, x_TH: Tensor, y_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, batch: Batch, cache: KvCache
    ) -> tuple[Tensor, Tensor]:
        """The two summands of the layer's output, from its input and the norm of that: the next norm adds them."""
        config, weights, linears = self.config, self.layers[layer], self.linears[layer]
        num_rows = x_TH.shape[0]
        qkv_TO = linears.qkv(y_TH)
        batch.apply_adapters(layer, "qkv", qkv_TO, y_TH)
        q_TO, k_TO, v_TO = torch.split(qkv_TO, list(config.qkv_sizes), dim=1)
        q_TND = q_TO.view(num_rows, config.num_heads, config.head_dim)
        k_TKD = k_TO.view(num_rows, config.num_kv_heads, config.head_dim)
        if weights.q_norm_D is not None and weights.k_norm_D is not None:
            q_TND = _norm_heads(q_TND, weights.q_norm_D, config.rms_norm_eps)
            k_TKD = _norm_heads(k_TKD, weights.k_norm_D, config.rms_norm_eps)
        q_TND = ops.rope_and_cache(
            q_TND,
            k_TKD,
            v_TO.view(num_rows, config.num_kv_heads, config.head_dim),
            cos_TD,
            sin_TD,
            cache.k[layer],
            cache.v[layer],
            batch.slots_T,
        )
        out_TND = ops.ragged_attention(
            q_TND, cache.k[layer], cache.v[layer], batch.attention, config.attention_scale, config.windows[layer]
        )
        out_TO = out_TND.reshape(num_rows, -1)
        o_TH = linears.o(batch.adapters.scaled_input(layer, "o", out_TO))
        batch.apply_adapters(layer, "o", o_TH, out_TO)
        m_TH, z_TH = ops.add_rms_norm(x_TH, o_TH, weights.post_norm_H, config.rms_norm_eps)
        gate_up_T2F = linears.gate_up(z_TH)
        batch.apply_adapters(layer, "gate_up", gate_up_T2F, z_TH)
        h_TF = ops.silu_mul(gate_up_T2F)
        down_TH = linears.down(batch.adapters.scaled_input(layer, "down", h_TF))
        batch.apply_adapters(layer, "down", down_TH, h_TF)
        mlp = dict(zip(("gate_up", "gate", "up"), (gate_up_T2F, *gate_up_T2F.chunk(2, dim=1)), strict=True))
        batch.save(layer, x=x_TH, y=y_TH, q=q_TND.flatten(1), out=out_TO, m=m_TH, z=z_TH, h=h_TF, **mlp)
        return m_TH, down_TH


def _stack_shape(config: ModelConfig) -> ops.StackShape:
    return ops.StackShape(
        num_hidden=config.hidden_size,
        num_inner=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        scale=config.attention_scale,
    )


def _norm_heads(x_TND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Each head of each row is a row of the norm."""
    return ops.rms_norm(x_TND.reshape(-1, x_TND.shape[2]), weight_D, eps).view(x_TND.shape)
