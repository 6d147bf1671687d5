"""How a head learns from one sequence, in units of bounded work. Knows the head and the sequence, no budget and no clock.

Rows are read (keys and values of each on its own), then trained some at a time on leaves of what was read, then the gradients
of the leaves go back through the reading: the sum over units is the gradient of the sequence's whole loss, and does not depend
on when they run. Costs are counted in multiply-adds.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.drafting.head import DraftHead, Read, Span
from kernels.drafting.training import NOISE, SAMPLED_SHARE, row_losses, sampled_classes, step_weights
from services.executor.lesson import LessonSequence

READ_ROWS = 64
TRAINED_ROWS = 16
"""Rows of one unit: few, so that a unit fits into the slack of a tight target, and fixed, so that sums keep their bits."""
BACK = 2
"""A backward pass multiplies this often as much as its forward pass: by the weights and by the inputs."""


UPDATE_COST = 50
"""Multiply-adds that take as long as to clip and update one weight, or to change a sum: these wait for memory."""


class Unit(NamedTuple):
    """Work that is done as a whole."""

    cost: float
    run: Callable[[], None]


class _Part(NamedTuple):
    """Rows [start, end) as they were read, with the gradients of what they became."""

    start: int
    end: int
    read: Read
    gradients: Read


class LessonUnits:
    """The units of one forwarded sequence; gradients are added to the head's, unless the head only shows what it knows.

    `seed` and the slice's place decide chance: noise, and the classes that the loss tells apart. Without chance (`is_exact`)
    there is no noise, and all classes count.
    """

    def __init__(
        self,
        head: DraftHead,
        sequence: LessonSequence,
        num_steps: int,
        seed: int,
        *,
        learns: bool = True,
        is_exact: bool = False,
    ) -> None:
        self._head, self._sequence, self._num_steps, self._learns = head, sequence, num_steps, learns
        self._noise, self._is_exact = 0.0 if is_exact else NOISE, is_exact
        place = f"{seed}/{sequence.item.step}/{sequence.item.index}"
        self._chance = torch.Generator().manual_seed(random.Random(place).getrandbits(63))
        self._parts: list[_Part] = []

    def __iter__(self) -> Iterator[Unit]:
        """In their order; each has to run before the next one is asked for."""
        trained = self._sequence.trained
        if not trained:
            return
        first, behind = max(0, trained[0] - self._head.shape.window + 1), trained[-1] + 1
        for start in range(first, behind, READ_ROWS):
            end = min(start + READ_ROWS, behind)
            yield Unit((end - start) * self._reading, functools.partial(self._run, self._read, start, end))
        for i in range(0, len(trained), TRAINED_ROWS):
            rows = trained[i : i + TRAINED_ROWS]
            yield Unit(len(rows) * self._training, functools.partial(self._run, self._train, rows))
        for part in self._parts if self._learns else ():
            yield Unit(BACK * (part.end - part.start) * self._reading, functools.partial(_go_back, part))
        self._parts = []

    @property
    def _reading(self) -> int:
        """Of one row."""
        head = self._head
        keys = 2 * head.shape.num_kv_heads * head.shape.head_dim * head.shape.hidden_size
        return head.features.weight.numel() + head.fuse.weight.numel() + keys

    @property
    def _training(self) -> float:
        """Of one row, all steps: the layer and the classes forward and back, and the whole vocabulary once."""
        head = self._head
        layer = sum(linear.weight.numel() for linear in (head.again, head.qkv, head.o, head.gate_up, head.down))
        vocabulary = head.head_VH.numel()
        passes = 1 + BACK if self._learns else 1
        classes = vocabulary if self._is_exact else vocabulary / SAMPLED_SHARE
        return self._num_steps * passes * (layer + classes) + vocabulary

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        with torch.set_grad_enabled(self._learns):
            work(*arguments)

    def _read(self, start: int, end: int) -> None:
        sequence = self._sequence
        features_TF = sequence.features_TF[start:end].float()
        noise_TF = torch.randn(features_TF.shape, generator=self._chance).to(features_TF.device)
        positions_T = torch.arange(start, end, device=features_TF.device)
        read = self._head.read(features_TF * (1 + self._noise * noise_TF), sequence.places_T[start + 1 : end + 1], positions_T)
        self._parts.append(_Part(start, end, read, Read(*(torch.zeros_like(tensor) for tensor in read))))

    def _train(self, rows: tuple[int, ...]) -> None:
        sequence, steps_S = self._sequence, torch.arange(self._num_steps)
        rows_R = torch.tensor(rows)
        seen = self._seen(max(0, rows[0] - self._head.shape.window + 1), rows[-1] + 1)
        leaves = Read(*(torch.cat(parts).requires_grad_() for parts in zip(*(read for read, _ in seen), strict=True)))
        first = rows[-1] + 1 - len(leaves.x_TH)
        ahead_RS = (rows_R[:, None] + 1 + steps_S).to(leaves.x_TH.device)
        last = len(sequence.tokens) - 1
        following_RS = sequence.places_T[ahead_RS.clamp(max=last)]
        weights_RS = torch.where(ahead_RS < last, sequence.weights_T[(ahead_RS + 1).clamp(max=last)], 0.0)
        span = Span(0, len(leaves.x_TH), rows_R.to(leaves.x_TH.device) - first)
        outs = self._head.go_on(
            leaves.x_TH[span.rows_R], rows_R.to(leaves.x_TH.device), following_RS, leaves.keys_TKD, leaves.values_TKD, [span]
        )
        truths = [sequence.truth(ahead_RS[:, step]) for step in range(self._num_steps)]
        num_classes = len(self._head.head_VH)
        every_C = torch.arange(num_classes, device=leaves.x_TH.device)
        classes_C = every_C if self._is_exact else sampled_classes(num_classes, truths, self._chance)
        loss = torch.zeros((), device=leaves.x_TH.device)
        for out_RH, truth, weights_R, share in zip(outs, truths, weights_RS.T, step_weights(self._num_steps), strict=True):
            loss = loss + share * (weights_R * row_losses(self._head, out_RH, truth, classes_C)).sum()
        if self._learns:
            loss.backward()  # type: ignore[no-untyped-call]
            self._add(seen, leaves)
        sequence.losses.append(loss.item())
        sequence.num_correct += self._hits(outs[0].detach(), truths[0].favourites_R)

    @torch.no_grad()
    def _hits(self, out_RH: Tensor, favourites_R: Tensor) -> int:
        """How often the head's first guess is the target's favourite; tokens outside of its vocabulary are never hit."""
        guesses_R = self._head.logits(out_RH).argmax(-1)
        return int(((guesses_R == favourites_R) & (favourites_R < len(self._head.head_VH) - 1)).sum())

    def _seen(self, start: int, end: int) -> list[tuple[Read, Read]]:
        """What was read of rows [start, end), and where its gradients go."""
        found = []
        for part in self._parts:
            low, high = max(start, part.start) - part.start, min(end, part.end) - part.start
            if low < high:
                read, gradients = (
                    Read(*(tensor.detach()[low:high] for tensor in each)) for each in (part.read, part.gradients)
                )
                found.append((read, gradients))
        return found

    def _add(self, seen: list[tuple[Read, Read]], leaves: Read) -> None:
        sizes = [len(read.x_TH) for read, _ in seen]
        for leaf, totals in zip(leaves, zip(*(gradients for _, gradients in seen), strict=True), strict=True):
            assert leaf.grad is not None
            for total, gradient in zip(totals, torch.split(leaf.grad, sizes), strict=True):
                total += gradient


def _go_back(part: _Part) -> None:
    torch.autograd.backward(list(part.read), list(part.gradients))
