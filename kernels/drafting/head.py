"""The drafter that is trained: one decoder layer that foresees the target's hidden states. Knows tensors, no data and no files.

After EAGLE (Li et al. 2024, features and tokens fused by a linear; 2025, several layers' features, training-time test).
Shapes: T rows of all sequences, R rows that are trained, H hidden, F features of all layers side by side, N query heads,
K kv heads, D head_dim, V reduced vocabulary and, last, one class for all other tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Sizes of a drafter; `feature_layers` count from 1, the last one is the target's output before its final norm."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feature_layers: tuple[int, ...]
    window: int
    """Committed tokens that a row attends to, its own included."""
    rope_theta: float
    rms_norm_eps: float


@dataclasses.dataclass(frozen=True)
class Span:
    """Rows [start, end) are one sequence; `rows_R` are those of them that are trained, counted from `start`."""

    start: int
    end: int
    rows_R: Tensor


class Read(NamedTuple):
    """Rows before attention: what the layer adds to [T, H], and keys and values [T, K, D]."""

    x_TH: Tensor
    keys_TKD: Tensor
    values_TKD: Tensor


class DraftHead(nn.Module):
    """Row i holds the target's features of token i and the embedding of token i + 1; its output foresees the features of i + 1.

    `unroll` goes on from its own outputs, as drafting does: step k of row i reads the token i + 1 + k.
    """

    def __init__(self, shape: HeadShape, embedding_VH: Tensor) -> None:
        """`embedding_VH` are the target's embeddings of the reduced vocabulary and, last, a row for all other tokens."""
        super().__init__()
        self.shape = shape
        hidden, inner = shape.hidden_size, shape.intermediate_size
        q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.embedding_VH = nn.Parameter(embedding_VH.clone())
        self.feature_norm_F = nn.Parameter(torch.ones(hidden * len(shape.feature_layers)))
        self.features = nn.Linear(hidden * len(shape.feature_layers), hidden, bias=False)
        self.token_norm_H = nn.Parameter(torch.ones(hidden))
        self.state_norm_H = nn.Parameter(torch.ones(hidden))
        self.fuse = nn.Linear(2 * hidden, hidden, bias=False)
        self.again_norm_H = nn.Parameter(torch.ones(hidden))
        self.again = nn.Linear(2 * hidden, hidden, bias=False)
        self.input_norm_H = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Linear(hidden, q + 2 * kv, bias=False)
        self.o = nn.Linear(q, hidden, bias=False)
        self.post_norm_H = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.final_norm_H = nn.Parameter(torch.ones(hidden))
        self.head_VH = nn.Parameter(embedding_VH.clone())
        with torch.no_grad():
            for linear in (self.features, self.fuse, self.again, self.qkv, self.gate_up, self.o, self.down):
                linear.weight.normal_(std=0.6 * linear.in_features**-0.5)

    def state(self, features_TF: Tensor) -> Tensor:
        """The state [T, H] that stands for the target's features."""
        layers = features_TF.view(len(features_TF), len(self.shape.feature_layers), -1)
        normed = F.rms_norm(layers, layers.shape[-1:], eps=self.shape.rms_norm_eps).flatten(1) * self.feature_norm_F
        out: Tensor = self.features(normed)
        return out

    def logits(self, out_RH: Tensor) -> Tensor:
        """Logits [R, V] of outputs."""
        return F.linear(self.normed(out_RH), self.head_VH)

    def normed(self, out_RH: Tensor) -> Tensor:
        """Outputs as the vocabulary's rows are multiplied with them."""
        return self._norm(out_RH, self.final_norm_H)

    def unroll(self, features_TF: Tensor, next_tokens_TS: Tensor, spans: Sequence[Span], num_steps: int) -> list[Tensor]:
        """Outputs [R, H] of each step; `next_tokens_TS[i, k]` is the reduced id of token i + 1 + k."""
        rows_R = torch.cat([span.start + span.rows_R for span in spans])
        positions_T = torch.cat([torch.arange(span.end - span.start) for span in spans])
        read = self.read(features_TF, next_tokens_TS[:, 0], positions_T)
        following_RS = next_tokens_TS[rows_R, :num_steps]
        return self.go_on(read.x_TH[rows_R], positions_T[rows_R], following_RS, read.keys_TKD, read.values_TKD, spans)

    def read(self, features_TF: Tensor, next_tokens_T: Tensor, positions_T: Tensor) -> Read:
        """What rows are before attention: each on its own."""
        x_TH = self._fused(self.state(features_TF), next_tokens_T)
        keys_TKD, values_TKD = self._keys(self._norm(x_TH, self.input_norm_H), positions_T)
        return Read(x_TH, keys_TKD, values_TKD)

    def go_on(
        self,
        x_RH: Tensor,
        positions_R: Tensor,
        following_RS: Tensor,
        keys_TKD: Tensor,
        values_TKD: Tensor,
        spans: Sequence[Span],
    ) -> list[Tensor]:
        """Outputs [R, H] of S steps from rows that were read; `following_RS[i, k]` is the token that step k reads."""
        q_size = self.shape.num_heads * self.shape.head_dim
        own: list[tuple[Tensor, Tensor]] = []
        outs: list[Tensor] = []
        for step in range(following_RS.shape[1]):
            at_R = positions_R + step
            if step:
                x_RH = self._continued(outs[-1], following_RS[:, step])
            normed_RH = self._norm(x_RH, self.input_norm_H)
            if step:
                own.append(self._keys(normed_RH, at_R))
            q_RND = F.linear(normed_RH, self.qkv.weight[:q_size]).view(len(x_RH), self.shape.num_heads, -1)
            attended_RO = self._attend(_rotate(q_RND, *self._rotary(at_R)), keys_TKD, values_TKD, own, spans)
            outs.append(self._rest(x_RH, attended_RO))
        return outs

    def _keys(self, normed_TH: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        q_size = self.shape.num_heads * self.shape.head_dim
        kv_TO = F.linear(normed_TH, self.qkv.weight[q_size:])
        keys_TKD, values_TKD = kv_TO.view(len(normed_TH), 2, self.shape.num_kv_heads, -1).unbind(1)
        return _rotate(keys_TKD, *self._rotary(positions_T)), values_TKD

    def _rest(self, x_RH: Tensor, attended_RO: Tensor) -> Tensor:
        m_RH = x_RH + self.o(attended_RO)
        gate_RF, up_RF = self.gate_up(self._norm(m_RH, self.post_norm_H)).chunk(2, dim=1)
        out: Tensor = m_RH + self.down(F.silu(gate_RF) * up_RF)
        return out

    def _fused(self, state_RH: Tensor, tokens_R: Tensor) -> Tensor:
        token_RH = self._norm(F.embedding(tokens_R, self.embedding_VH), self.token_norm_H)
        out: Tensor = self.fuse(torch.cat([token_RH, self._norm(state_RH, self.state_norm_H)], dim=1))
        return out

    def _continued(self, out_RH: Tensor, tokens_R: Tensor) -> Tensor:
        """Own outputs are less than the target's features: they have a map of their own."""
        token_RH = self._norm(F.embedding(tokens_R, self.embedding_VH), self.token_norm_H)
        x_RH: Tensor = self.again(torch.cat([token_RH, self._norm(out_RH, self.again_norm_H)], dim=1))
        return x_RH

    def _attend(
        self, q_RND: Tensor, k_TKD: Tensor, v_TKD: Tensor, own: Sequence[tuple[Tensor, Tensor]], spans: Sequence[Span]
    ) -> Tensor:
        """Each row sees the window of its sequence up to itself and, in later steps, its own earlier ones."""
        groups, kv_heads = self.shape.num_heads // self.shape.num_kv_heads, self.shape.num_kv_heads
        q_RKGD = q_RND.view(len(q_RND), kv_heads, groups, -1) * self.shape.head_dim**-0.5
        parts, at = [], 0
        own_k_RKSD = torch.stack([k for k, _ in own], dim=2) if own else None
        own_v_RKSD = torch.stack([v for _, v in own], dim=2) if own else None
        for span in spans:
            num_rows = len(span.rows_R)
            q = q_RKGD[at : at + num_rows].permute(1, 2, 0, 3).reshape(kv_heads, groups * num_rows, -1)
            k, v = k_TKD[span.start : span.end].transpose(0, 1), v_TKD[span.start : span.end].transpose(0, 1)
            behind = span.rows_R[:, None] - torch.arange(span.end - span.start, device=q.device)[None]
            hidden_RL = (behind < 0) | (behind >= self.shape.window)
            scores = (q @ k.transpose(1, 2)).view(kv_heads, groups, num_rows, -1).masked_fill(hidden_RL, -torch.inf)
            if own_k_RKSD is None or own_v_RKSD is None:
                out = scores.softmax(-1).view(kv_heads, groups * num_rows, -1) @ v
                parts.append(out.view(kv_heads, groups, num_rows, -1).permute(2, 0, 1, 3).reshape(num_rows, -1))
            else:
                mine = torch.einsum("rkgd,rksd->kgrs", q_RKGD[at : at + num_rows], own_k_RKSD[at : at + num_rows])
                weights = torch.cat([scores, mine], dim=-1).softmax(-1)
                num_own = mine.shape[-1]
                out = weights[..., :-num_own].reshape(kv_heads, groups * num_rows, -1) @ v
                out = out.view(kv_heads, groups, num_rows, -1).permute(2, 0, 1, 3)
                out = out + torch.einsum("kgrs,rksd->rkgd", weights[..., -num_own:], own_v_RKSD[at : at + num_rows])
                parts.append(out.reshape(num_rows, -1))
            at += num_rows
        return torch.cat(parts)

    def _norm(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        return F.rms_norm(x_TH, weight_H.shape, weight_H, self.shape.rms_norm_eps)

    def _rotary(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, D] of these positions."""
        half = self.shape.head_dim // 2
        rates = self.shape.rope_theta ** -(torch.arange(half, dtype=torch.float32, device=positions_T.device) / half)
        angles_TD = positions_T.float()[:, None] * rates.repeat(2)[None]
        return angles_TD.cos(), angles_TD.sin()


def _rotate(x_RND: Tensor, cos_RD: Tensor, sin_RD: Tensor) -> Tensor:
    """Rotary embedding, halves rotated, as in the Llama family."""
    half = x_RND.shape[-1] // 2
    turned = torch.cat([-x_RND[..., half:], x_RND[..., :half]], dim=-1)
    return x_RND * cos_RD[:, None] + turned * sin_RD[:, None]
