"""One sequence in training: its forward windows, its loss, the gradient at its top. Knows no adapter or job."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.activation_plan import ActivationPlan
from common.messages import EvaluationSlice, TrainingSlice
from kernels import ops
from services.executor.dropout import RowDropout
from services.executor.model import Decoder
from services.executor.tape import ActivationTape


class InvalidSliceError(ValueError):
    """The slice cannot be trained on; the message names the field."""


class TrainingSequence:
    """A slice in work. The engine sets `slots_T` before the first window, forwards `num_rows` rows and calls `head` on each.

    `num_rows` ends before the last predicted token: rows after it have no gradient.
    """

    def __init__(
        self, item: TrainingSlice, decoder: Decoder, plan: ActivationPlan, *, dropout: float = 0.0, seed: int = 0
    ) -> None:
        device = decoder.device
        self.item = item
        self.tokens = item.tokens
        self.num_rows = max((i for i, weight in enumerate(item.weights) if i and weight), default=0)
        self.num_forwarded = 0
        self.slots_T = torch.empty(0, dtype=torch.int64, device=device)
        self.tape = ActivationTape(plan, self.num_rows, decoder.dtype, device)
        self.dropout = RowDropout.of_sequence(
            dropout, seed=seed, step=item.step, index=item.index, num_rows=self.num_rows, device=device
        )
        self._losses: list[float] = []
        self.num_correct = 0
        self.num_tokens = sum(1 for weight in item.weights[1:] if weight)
        self._decoder = decoder
        # On the host: which rows have weight is asked there.
        self._labels_T = torch.tensor(item.tokens[1 : self.num_rows + 1], dtype=torch.int64)
        wide = torch.promote_types(decoder.dtype, torch.float32)
        self._weights_T = torch.tensor(item.weights[1 : self.num_rows + 1], dtype=wide)
        self.dx_TH = torch.empty(self.num_rows, decoder.config.hidden_size, dtype=decoder.dtype, device=device)

    @property
    def loss(self) -> float:
        """The weighted sum so far, rounded once: the same for any windows."""
        return math.fsum(self._losses) if all(map(math.isfinite, self._losses)) else sum(self._losses)

    @property
    def is_forwarded(self) -> bool:
        """Whether the backward pass can start."""
        return self.num_forwarded == self.num_rows

    def head(self, hidden_WH: Tensor, start: int) -> None:
        """Loss and gradient of a forwarded window, from the last layer's output (before the final norm)."""
        heads([(self, start, hidden_WH.shape[0])], hidden_WH)

    def _take_head(self, start: int, losses: list[float], hits: list[bool]) -> None:
        self._losses += losses
        self.num_correct += sum(hits)
        self.num_forwarded = start + len(losses)

    def _check_window(self, start: int, num_rows: int) -> None:
        if start != self.num_forwarded or not 0 < num_rows <= self.num_rows - start:
            raise ValueError(f"window [{start}, +{num_rows}) after {self.num_forwarded} of {self.num_rows} rows")


def heads(windows: Sequence[tuple[TrainingSequence, int, int]], hidden_TH: Tensor) -> None:
    """Losses and gradients of all windows (sequence, start, number of rows) of a pass, whose rows follow each other."""
    for sequence, start, num_rows in windows:
        sequence._check_window(start, num_rows)
    decoder, places = windows[0][0]._decoder, [slice(start, start + num_rows) for _, start, num_rows in windows]
    norm_H, eps = decoder.final_norm_H, decoder.config.rms_norm_eps
    labels_T = torch.cat([sequence._labels_T[rows] for (sequence, _, _), rows in zip(windows, places, strict=True)])
    weights_T = torch.cat([sequence._weights_T[rows] for (sequence, _, _), rows in zip(windows, places, strict=True)])
    normed_TH = ops.rms_norm(hidden_TH, norm_H, eps)
    loss_T, hits_T, dnormed_TH = ops.linear_cross_entropy(normed_TH, decoder.head, labels_T, weights_T)
    dx_TH = ops.rms_norm_backward(dnormed_TH, hidden_TH, norm_H, eps)
    dx = torch.split(dx_TH, [num_rows for _, _, num_rows in windows])
    torch._foreach_copy_([sequence.dx_TH[rows] for (sequence, _, _), rows in zip(windows, places, strict=True)], dx)
    losses, hits = map(iter, torch.stack((loss_T, hits_T.to(loss_T.dtype))).tolist())
    for sequence, start, num_rows in windows:
        are_hits = [bool(hit) for hit in itertools.islice(hits, num_rows)]
        sequence._take_head(start, list(itertools.islice(losses, num_rows)), are_hits)


def check_slice(item: TrainingSlice | EvaluationSlice, decoder: Decoder) -> None:
    """Raises InvalidSliceError for a slice that no job can train on."""
    if len(item.weights) != len(item.tokens):
        raise InvalidSliceError(f"weights: {len(item.weights)} for {len(item.tokens)} tokens")
    if not item.tokens:
        raise InvalidSliceError("tokens: empty")
    if len(item.tokens) > decoder.config.max_position_embeddings:
        raise InvalidSliceError(f"tokens: {len(item.tokens)}, the model takes {decoder.config.max_position_embeddings}")
    if not 0 <= min(item.tokens) <= max(item.tokens) < decoder.config.vocab_size:
        raise InvalidSliceError(f"tokens: ids must be in [0, {decoder.config.vocab_size})")
    if not all(math.isfinite(weight) for weight in item.weights):
        raise InvalidSliceError("weights: not finite")
