"""Where training starts without data: the target's last state, as it is, goes on as the guess. Knows no texts."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.drafting.head import DraftHead

SMALL = 0.15
"""What the layer adds to the inputs' map begins this much smaller than usual."""
CAUTION = 0.6
"""Scale of the first logits: a first guess is less sure than it looks, and the final norm would hide that."""


@torch.no_grad()
def start_from_identity(head: DraftHead, final_norm_H: Tensor) -> None:
    """Set the inputs' maps so that the outputs are the target's last state, normed, and the tokens add little yet."""
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
