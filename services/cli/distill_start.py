"""Where training starts: the linear map from features and tokens to the next features. Knows no server and no files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.drafting.head import DraftHead
from kernels.drafting.start import settle
from services.cli.distill_target import Target
from services.cli.distill_train import Lesson

RIDGE = 0.005
"""Of the inputs' mean square."""
MAX_ROWS = 100_000
"""Of texts that the maps are fitted to."""


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
            rows.append(_rows(lesson, head))
            num_rows += len(lesson.places_T)
    if not rows:
        return
    map_IO = _ridge(rows)
    guesses = [F.rms_norm(inputs @ map_IO, (hidden,), eps=eps) for inputs, _ in rows]
    again_IO = _ridge(
        [
            (torch.cat([inputs[1:, :hidden], guess[:-1]], 1), truth[1:])
            for (inputs, truth), guess in zip(rows, guesses, strict=True)
        ]
    )
    states_TH = torch.cat([inputs[:, hidden:] @ map_IO[hidden:] for inputs, _ in rows[:64]])
    scale = states_TH.square().mean(1).sqrt().mean()  # states are normed before they are added
    head.features.weight.copy_(map_IO[hidden:].T)
    head.fuse.weight.copy_(torch.cat([map_IO[:hidden].T, scale * torch.eye(hidden)], dim=1))
    head.again.weight.copy_(again_IO.T)
    settle(head, target.final_norm.weight)


def _rows(lesson: Lesson, head: DraftHead) -> tuple[Tensor, Tensor]:
    """Inputs [T, (1 + layers) * H] and what they should give [T, H]. The first token's features are no others': left out."""
    hidden, eps = head.shape.hidden_size, head.shape.rms_norm_eps
    normed_TLH = F.rms_norm(lesson.trace.features_TF.float().view(len(lesson.places_T), -1, hidden), (hidden,), eps=eps)
    token_TH = F.rms_norm(F.embedding(lesson.places_T[1:], head.embedding_VH), (hidden,), eps=eps)
    return torch.cat([token_TH, normed_TLH[:-1].flatten(1)], dim=1)[1:], normed_TLH[2:, -1]


def _ridge(rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The map [I, O] with the least squared error on these inputs and outputs."""
    num_in, num_out = rows[0][0].shape[1], rows[0][1].shape[1]
    gram, moment = torch.zeros(num_in, num_in), torch.zeros(num_in, num_out)
    for inputs, outputs in rows:
        gram.addmm_(inputs.T, inputs)
        moment.addmm_(inputs.T, outputs)
    solved: Tensor = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)), moment)
    return solved
