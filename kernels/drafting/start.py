"""Where a head's training starts: least squares of the target's next state, or its last state as it is. Knows no texts.

Shapes: R rows, I inputs (the token's embedding and the features of all layers, each normed), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.drafting.head import DraftHead

RIDGE = 0.005
"""Of the inputs' mean square."""
BLOCK = 128
"""Columns that one part of a solution eliminates."""
SMALL = 0.15
"""What the layer adds to the inputs' map begins this much smaller than usual."""
CAUTION = 0.6
"""Scale of the first logits: a first guess is less sure than it looks, and the final norm would hide that."""


def fit_rows(head: DraftHead, features_TF: Tensor, following_R: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [R, I] and what they should give [R, H], of R + 1 tokens' features and the places of the last R tokens."""
    hidden, eps = head.shape.hidden_size, head.shape.rms_norm_eps
    normed_TLH = F.rms_norm(features_TF.float().view(len(features_TF), -1, hidden), (hidden,), eps=eps)
    token_RH = F.rms_norm(F.embedding(following_R, head.embedding_VH), (hidden,), eps=eps)
    return torch.cat([token_RH, normed_TLH[:-1].flatten(1)], dim=1), normed_TLH[1:, -1]


class LeastSquares(NamedTuple):
    """Sums over rows, of which `Solution` makes the map [I, O] with the least squared error."""

    gram_II: Tensor
    moment_IO: Tensor

    @classmethod
    def empty(cls, num_inputs: int, num_outputs: int, device: torch.device | None = None) -> LeastSquares:
        """Of no rows."""
        return cls(torch.zeros(num_inputs, num_inputs, device=device), torch.zeros(num_inputs, num_outputs, device=device))

    def add(self, inputs_RI: Tensor, outputs_RO: Tensor) -> None:
        """Some rows more."""
        self.gram_II.addmm_(inputs_RI.T, inputs_RI)
        self.moment_IO.addmm_(inputs_RI.T, outputs_RO)

    def take(self, other: LeastSquares) -> None:
        """Other rows' sums too; the other is empty then."""
        for own, added in zip(self, other, strict=True):
            own += added
            added.zero_()

    def of_inputs(self, chosen_I: Tensor) -> LeastSquares:
        """A copy, for some of the inputs alone."""
        return LeastSquares(self.gram_II[chosen_I][:, chosen_I], self.moment_IO[chosen_I])


class Solution:
    """The ridge regression of sums, in whose place it comes, in parts of bounded work: Cholesky by blocks of columns."""

    def __init__(self, sums: LeastSquares) -> None:
        self._factor_II, self.map_IO = sums
        """The map, once all parts have run."""
        diagonal_I = self._factor_II.diagonal()
        diagonal_I += RIDGE * diagonal_I.mean()

    def solved(self) -> Tensor:
        """The map [I, O], all parts at once."""
        for _, run in self.parts():
            run()
        return self.map_IO

    def parts(self) -> Iterator[tuple[int, Callable[[], None]]]:
        """Multiply-adds and work of each part, which has to run before the next one is asked for."""
        size, num_outputs = self.map_IO.shape
        starts = range(0, size, BLOCK)
        for start in starts:
            end = min(start + BLOCK, size)
            cost = (size - start) * (end - start) * end
            yield cost, lambda start=start, end=end: self._factor(start, end)  # type: ignore[misc]
        for start in starts:
            end = min(start + BLOCK, size)
            yield (end - start) * end * num_outputs, lambda start=start, end=end: self._forward(start, end)  # type: ignore[misc]
        for start in reversed(starts):
            end = min(start + BLOCK, size)
            cost = (end - start) * (size - start) * num_outputs
            yield cost, lambda start=start, end=end: self._back(start, end)  # type: ignore[misc]

    def _factor(self, start: int, end: int) -> None:
        factor = self._factor_II
        factor[start:, start:end] -= factor[start:, :start] @ factor[start:end, :start].T
        top = torch.linalg.cholesky(factor[start:end, start:end])
        factor[start:end, start:end] = top
        factor[end:, start:end] = torch.linalg.solve_triangular(top, factor[end:, start:end].T, upper=False).T

    def _forward(self, start: int, end: int) -> None:
        factor, out = self._factor_II, self.map_IO
        rest = out[start:end] - factor[start:end, :start] @ out[:start]
        out[start:end] = torch.linalg.solve_triangular(factor[start:end, start:end], rest, upper=False)

    def _back(self, start: int, end: int) -> None:
        factor, out = self._factor_II, self.map_IO
        rest = out[start:end] - factor[end:, start:end].T @ out[end:]
        out[start:end] = torch.linalg.solve_triangular(factor[start:end, start:end].T, rest, upper=True)


@torch.no_grad()
def start_from_maps(head: DraftHead, map_IO: Tensor, again_IO: Tensor, sample_RI: Tensor) -> None:
    """Let the outputs begin as these maps of inputs and of own outputs; `sample_RI` are inputs as they come."""
    hidden = head.shape.hidden_size
    states_RH = sample_RI[:, hidden:] @ map_IO[hidden:]
    scale = states_RH.square().mean(1).sqrt().mean()  # states are normed before they are added
    head.features.weight.copy_(map_IO[hidden:].T)
    head.fuse.weight.copy_(torch.cat([map_IO[:hidden].T, scale * torch.eye(hidden, device=map_IO.device)], dim=1))
    head.again.weight.copy_(again_IO.T)


@torch.no_grad()
def start_from_identity(head: DraftHead, final_norm_H: Tensor) -> None:
    """Let the outputs begin as the target's last state, normed, to which the tokens add little yet."""
    hidden = head.shape.hidden_size
    identity_HH = torch.eye(hidden, device=head.features.weight.device)
    head.features.weight[:, :-hidden].mul_(SMALL)
    head.features.weight[:, -hidden:] = identity_HH
    for fuse in (head.fuse, head.again):
        fuse.weight[:, hidden:] = identity_HH
    settle(head, final_norm_H)


@torch.no_grad()
def settle(head: DraftHead, final_norm_H: Tensor) -> None:
    """Let the layer begin small, behind the target's own final norm."""
    head.o.weight.mul_(SMALL)
    head.down.weight.mul_(SMALL)
    head.final_norm_H.copy_(CAUTION * final_norm_H)
