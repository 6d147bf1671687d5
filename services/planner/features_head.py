"""The trained head of the features drafter, ready to run: weights, keys and values. Knows tensors, no sequences and no trees.

What it computes is `kernels.drafting.head.DraftHead` (after EAGLE): a row holds the target's features of one token and the
embedding of the next one, and foresees the features of that. Shapes: R rows, H hidden, F features of all layers side by side,
N query heads, K kv heads, D head_dim, S slots, V reduced vocabulary and, last, one class for all other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import ConfigError
from kernels import ops
from kernels.drafting.files import DrafterFilesError, StoredDrafter, read_drafter


class FeaturesHead:
    """One decoder layer, fed with the target's features or its own outputs. Not for several threads at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError, naming the folder, if it holds no such head."""
        try:
            self._read(read_drafter(folder))
        except DrafterFilesError as error:
            raise ConfigError(str(error)) from error
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{folder} is no drafter on features: {error!r}") from error

    def _read(self, stored: StoredDrafter) -> None:
        shape = stored.shape
        self.fingerprint, self.feature_layers, self.max_depth = stored.fingerprint, shape.feature_layers, stored.max_depth
        self.window, self.hidden_size = shape.window, shape.hidden_size
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        self.head_dim, self._eps = shape.head_dim, shape.rms_norm_eps
        self.dtype = torch.bfloat16 if ops.has_fast_bfloat16() else torch.float32
        values = {name: value.to(self.dtype) for name, value in stored.weights.items()}
        self.vocabulary = vocabulary = stored.vocabulary
        self.place = {token: i for i, token in enumerate(vocabulary)}
        """Of each token in the reduced vocabulary."""
        self._embedding_VH = values["embedding_VH"]
        self._norms = {name: values[name] for name in values if "_norm_" in name}
        self._features, self._fuse = ops.Linear(values["features.weight"]), ops.Linear(values["fuse.weight"])
        self._again = ops.Linear(values["again.weight"])
        self._qkv, self._o = ops.Linear(values["qkv.weight"]), ops.Linear(values["o.weight"])
        self._gate_up, self._down = ops.Linear(values["gate_up.weight"]), ops.Linear(values["down.weight"])
        self._head = ops.Linear(values.get("head_VH", self._embedding_VH))
        half = self.head_dim // 2
        self._rates = shape.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
        self._cos_PD, self._sin_PD = torch.empty(2, 0, self.head_dim, dtype=self.dtype)
        self._keys, self._values = torch.empty(2, 0, self.num_kv_heads, self.head_dim, dtype=self.dtype)

    @property
    def row_bytes(self) -> int:
        """Size of the target's features of one token."""
        return 2 * self.hidden_size * len(self.feature_layers)

    @property
    def other(self) -> int:
        """The place of all tokens outside of the reduced vocabulary."""
        return len(self.vocabulary)

    def reserve(self, num_slots: int, num_positions: int) -> None:
        """Room for keys and values of so many slots, and for so many positions; what is there stays."""
        if (missing := num_slots - len(self._keys)) > 0:
            more = torch.zeros(missing, *self._keys.shape[1:], dtype=self.dtype)
            self._keys, self._values = torch.cat([self._keys, more]), torch.cat([self._values, more])
        if num_positions > len(self._cos_PD):
            angles = torch.outer(torch.arange(2 * num_positions, dtype=torch.float64), self._rates.repeat(2))
            self._cos_PD, self._sin_PD = angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def states(self, features: bytes) -> Tensor:
        """The states [R, H] that stand for these rows of the target's features."""
        raw = torch.frombuffer(bytearray(features), dtype=torch.bfloat16).to(self.dtype)
        layers = raw.view(-1, self.hidden_size)
        ones_H = torch.ones(self.hidden_size, dtype=self.dtype)
        normed = ops.rms_norm(layers, ones_H, self._eps).view(-1, self.hidden_size * len(self.feature_layers))
        return self._features(normed * self._norms["feature_norm_F"])

    def write(
        self, states_RH: Tensor, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], *, is_own: bool
    ) -> tuple[Tensor, Tensor]:
        """Put keys and values of rows into their slots; returns the rows' inputs [R, H] and queries [R, N, D].

        The states stand for the target's features or, `is_own`, are the head's own outputs.
        """
        places_R = torch.tensor([self.place.get(token, self.other) for token in tokens])
        token_RH = self._norm(F.embedding(places_R, self._embedding_VH), "token_norm_H")
        fuse, norm = (self._again, "again_norm_H") if is_own else (self._fuse, "state_norm_H")
        x_RH = fuse(torch.cat([token_RH, self._norm(states_RH, norm)], dim=1))
        qkv_RO = self._qkv(self._norm(x_RH, "input_norm_H"))
        heads_RHD = qkv_RO.view(len(x_RH), -1, self.head_dim)
        q_RND, k_RKD, v_RKD = torch.split(heads_RHD, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        at_R = torch.tensor(positions)
        q_RND = ops.rope_and_cache(
            q_RND, k_RKD, v_RKD, self._cos_PD[at_R], self._sin_PD[at_R], self._keys, self._values, torch.tensor(slots)
        )
        return x_RH, q_RND

    def attend(self, x_RH: Tensor, q_RND: Tensor, seen: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Outputs [R, H], the states of the next step, and log probabilities [R, V]; each row sees these slots, its own too."""
        slots = torch.split(torch.tensor([slot for each in seen for slot in each]), [len(each) for each in seen])
        plan = ops.AttentionPlan([ops.AttentionSegment(start=i, end=i + 1, slots_L=slots_L) for i, slots_L in enumerate(slots)])
        out_RND = ops.ragged_attention(q_RND, self._keys, self._values, plan, self.head_dim**-0.5)
        o_RH = self._o(out_RND.reshape(len(x_RH), -1))
        m_RH, z_RH = ops.add_rms_norm(x_RH, o_RH, self._norms["post_norm_H"], self._eps)
        out_RH = m_RH + self._down(ops.silu_mul(self._gate_up(z_RH)))
        return out_RH, self._head(self._norm(out_RH, "final_norm_H")).float().log_softmax(-1)

    def _norm(self, x_RH: Tensor, name: str) -> Tensor:
        return ops.rms_norm(x_RH, self._norms[name], self._eps)
