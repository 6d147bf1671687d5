"""What a drafter's head learns from, its loss and its optimizer. Knows no texts, no batches and no schedule.

R rows that are trained, V reduced vocabulary with one class for all other tokens, C classes that a loss tells apart, k of the
target's favourites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops
from kernels.drafting.head import DraftHead

NUM_FAVOURITES = 24
STEP_DECAY = 0.85
"""A later step's loss weighs so much of the one before."""
HARD_SHARE = 0.5
"""Weight of the target's favourite token in the loss; the rest is its whole distribution."""
NOISE = 0.05
"""Relative, on the features that are learned from."""
MAPS = ("features.weight", "fuse.weight", "again.weight")
"""The inputs' maps, which may start from least squares; they are easily spoilt then."""
SAMPLED_SHARE = 14
"""One class in so many is in a sampled loss by chance."""


class Truth(NamedTuple):
    """What the target says behind R rows: its favourite's place, the places it likes most, and their probabilities."""

    favourites_R: Tensor
    top_Rk: Tensor
    probs_Rk: Tensor


def liked(logits_RV: Tensor, log_sums_R: Tensor) -> tuple[Tensor, Tensor]:
    """The places that the target likes most [R, k] (int32) and their probabilities (half).

    From its logits of the reduced vocabulary and the logarithm of its softmax's whole denominator.
    """
    top_Rk, places_Rk = logits_RV.topk(min(NUM_FAVOURITES, logits_RV.shape[1]), dim=1)
    return places_Rk.int(), (top_Rk - log_sums_R[:, None]).exp().half()


def step_weights(num_steps: int) -> Tensor:
    """Of each step's loss; they sum to one."""
    weights_S = torch.tensor([STEP_DECAY**step for step in range(num_steps)])
    return weights_S / weights_S.sum()


def sampled_classes(num_classes: int, truths: Sequence[Truth], generator: torch.Generator | None = None) -> Tensor:
    """Classes [C], rising: what the target likes in these rows, the class of all other tokens, and some by chance."""
    by_chance = torch.randint(0, num_classes, (num_classes // SAMPLED_SHARE,), generator=generator)
    device = truths[0].favourites_R.device
    parts = [truth.top_Rk[:, :6].flatten() for truth in truths] + [truth.favourites_R for truth in truths]
    classes_C: Tensor = torch.unique(torch.cat([*parts, torch.tensor([num_classes - 1], device=device), by_chance.to(device)]))
    return classes_C


def row_losses(head: DraftHead, out_RH: Tensor, truth: Truth, classes_C: Tensor, hard_share: float = HARD_SHARE) -> Tensor:
    """Of each output [R]: cross entropy with the target's distribution, its rest counted as the last class, and with its
    favourite. The last class and all favourites must be among `classes_C`."""
    is_sampled = len(classes_C) < len(head.head_VH)
    place_V = torch.full((len(head.head_VH),), -1, device=classes_C.device)
    place_V[classes_C] = torch.arange(len(classes_C), device=classes_C.device)
    rows_CH = head.head_VH[classes_C] if is_sampled else head.head_VH  # all of them: without a copy
    log_probs_RC = F.linear(head.normed(out_RH), rows_CH).log_softmax(-1)
    top_Rk, probs_Rk = place_V[truth.top_Rk], truth.probs_Rk
    soft_R = -(probs_Rk * (top_Rk >= 0) * log_probs_RC.gather(1, top_Rk.clamp(min=0))).sum(1)
    soft_R = soft_R - (1 - probs_Rk.sum(1)).clamp(min=0) * log_probs_RC[:, -1]
    hard_R = -log_probs_RC.gather(1, place_V[truth.favourites_R][:, None])[:, 0]
    return hard_share * hard_R + (1 - hard_share) * soft_R


class HeadOptimizer:
    """AdamW over what is trained of a head; its embeddings and output rows stay the target's."""

    def __init__(self, head: DraftHead) -> None:
        head.embedding_VH.requires_grad_(False)
        head.head_VH.requires_grad_(False)
        self.parameters = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
        self.exp_avg = {name: torch.zeros_like(value.data) for name, value in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(value.data) for name, value in self.parameters.items()}

    def clip(self, max_norm: float) -> float:
        """Clip the global norm of the gradients, 0: not at all; returns what it was."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), max_norm or torch.inf))

    @torch.no_grad()
    def update(self, name: str, step: int, learning_rate: float) -> None:
        """Apply one parameter's gradient and forget it; `step` counts from 1. What has no gradient stays."""
        parameter = self.parameters[name]
        if parameter.grad is None:
            return
        ops.adamw(
            [parameter.data], [parameter.grad], [self.exp_avg[name]], [self.exp_avg_sq[name]],
            step=step, learning_rate=learning_rate, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0,
        )  # fmt: skip
        parameter.grad = None
