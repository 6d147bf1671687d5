"""Where training starts: the linear map from features and tokens to the next features. Knows no server and no files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.drafting.head import DraftHead
from kernels.drafting.start import LeastSquares, Solution, fit_rows, settle, start_from_maps
from services.cli.distill_target import Target
from services.cli.distill_train import Lesson

MAX_ROWS = 100_000
"""Of texts that the maps are fitted to."""
NUM_SAMPLES = 64
"""Texts that the states' scale is taken from."""


@torch.no_grad()
def start_from_least_squares(head: DraftHead, lessons: Sequence[Lesson], target: Target) -> None:
    """Set the head's inputs so that its outputs are ridge regressions of the target's normed last state: on the target's
    features, and on the first regression's outputs for the steps after the first one.

    It takes seconds, and saves most of the training: a random start has to find these maps by small steps.
    """
    hidden, eps = head.shape.hidden_size, head.shape.rms_norm_eps
    rows, num_rows = [], 0
    for lesson in lessons:
        if num_rows < MAX_ROWS and len(lesson.places_T) > 3:
            rows.append(fit_rows(head, lesson.trace.features_TF[1:], lesson.places_T[2:]))  # the first token's are no others'
            num_rows += len(lesson.places_T)
    if not rows:
        return
    map_IO = _fitted(rows)
    guesses = [F.rms_norm(inputs @ map_IO, (hidden,), eps=eps) for inputs, _ in rows]
    again_IO = _fitted(
        [
            (torch.cat([inputs[1:, :hidden], guess[:-1]], 1), truth[1:])
            for (inputs, truth), guess in zip(rows, guesses, strict=True)
        ]
    )
    sample_RI = torch.cat([inputs for inputs, _ in rows[:NUM_SAMPLES]])
    start_from_maps(head, map_IO, again_IO, sample_RI)
    settle(head, target.final_norm.weight)


def _fitted(rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The map [I, O] with the least squared error on these inputs and outputs."""
    sums = LeastSquares.empty(rows[0][0].shape[1], rows[0][1].shape[1])
    for inputs, outputs in rows:
        sums.add(inputs, outputs)
    return Solution(sums).solved()
