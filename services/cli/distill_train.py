"""Training of a drafter on the target's traces: batches, loss, optimizer. Knows no files and no server.

Rows are positions of texts: R of a batch, S steps of unrolling each; C classes of a batch's loss, k favourites of the target.
Steps rise while it trains (EAGLE-3's training-time test comes last); most of the time the loss is over a sample of classes.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kernels.drafting import training
from kernels.drafting.head import DraftHead, Span
from kernels.drafting.training import MAPS, HeadOptimizer, Truth, liked, row_losses, sampled_classes, step_weights
from services.cli.distill_target import Target, Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How it is trained."""

    epochs: float = 4.0
    batch_rows: int = 700
    max_steps: int = 4
    prompt_share: float = 0.25
    """Rows of prompts that are trained, besides all rows of answers."""
    hard_share: float = training.HARD_SHARE
    noise: float = training.NOISE
    map_rate: float = 5e-5
    """Learning rate of the maps that start from least squares; they are easily spoilt."""
    layer_rate: float = 4e-4
    norm_rate: float = 3e-4
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A trace with the target's favourite tokens in places of the reduced vocabulary, and their probabilities [T, k]."""

    trace: Trace
    places_T: Tensor
    favourites_T: Tensor
    top_Tk: Tensor
    probs_Tk: Tensor


@torch.inference_mode()
def lessons_of(traces: Sequence[Trace], target: Target, places_V: Tensor, vocabulary: Sequence[int]) -> list[Lesson]:
    """`places_V` maps tokens to the reduced vocabulary, others to its length."""
    rows_VH = target.head_VH[torch.tensor(vocabulary)]
    found = []
    for trace in traces:
        last_TH = trace.features_TF[:, -rows_VH.shape[1] :].float()
        top_Tk, probs_Tk = liked(target.final_norm(last_TH) @ rows_VH.T, trace.log_sums_T)
        tokens_T = torch.tensor(trace.example.tokens)
        found.append(Lesson(trace, places_V[tokens_T], places_V[trace.favourites_T], top_Tk, probs_Tk))
    return found


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of some lessons, ready to unroll."""

    features_TF: Tensor
    following_TS: Tensor
    spans: list[Span]
    favourites_RS: Tensor
    top_RSk: Tensor
    probs_RSk: Tensor


def batches(
    lessons: Sequence[Lesson], num_rows: int, num_steps: int, prompt_share: float, rng: random.Random | None = None
) -> Iterator[Batch]:
    """All lessons once, shuffled if there is an `rng`; a row whose steps would leave its text is left out."""
    order = list(lessons)
    if rng is not None:
        rng.shuffle(order)
    chosen: list[tuple[Lesson, Tensor]] = []
    for lesson in order:
        rows_R = _rows(lesson, num_steps, prompt_share)
        if len(rows_R):
            chosen.append((lesson, rows_R))
        if sum(len(rows) for _, rows in chosen) >= num_rows:
            yield _batch(chosen, num_steps)
            chosen = []
    if chosen:
        yield _batch(chosen, num_steps)


def _rows(lesson: Lesson, num_steps: int, prompt_share: float) -> Tensor:
    example = lesson.trace.example
    end = len(example.tokens) - 1 - num_steps
    first = max(0, example.num_prompt - 2)  # its token starts the answer, so that the answer's second token is foreseen
    prompt_R = torch.arange(max(0, min(first, end)))
    return torch.cat([prompt_R[torch.rand(len(prompt_R)) < prompt_share], torch.arange(first, max(first, end))])


def _batch(chosen: Sequence[tuple[Lesson, Tensor]], num_steps: int) -> Batch:
    spans, following, at = list[Span](), list[Tensor](), 0
    steps_S = torch.arange(num_steps)
    for lesson, rows_R in chosen:
        length = len(lesson.places_T)
        spans.append(Span(at, at + length, rows_R))
        following.append(lesson.places_T[(torch.arange(length)[:, None] + 1 + steps_S).clamp(max=length - 1)])
        at += length
    at_RS = [(lesson, rows_R[:, None] + 1 + steps_S) for lesson, rows_R in chosen]
    return Batch(
        features_TF=torch.cat([lesson.trace.features_TF.float() for lesson, _ in chosen]),
        following_TS=torch.cat(following),
        spans=spans,
        favourites_RS=torch.cat([lesson.favourites_T[at] for lesson, at in at_RS]),
        top_RSk=torch.cat([lesson.top_Tk[at] for lesson, at in at_RS]).long(),
        probs_RSk=torch.cat([lesson.probs_Tk[at] for lesson, at in at_RS]).float(),
    )


class Trainer:
    """Trains a head; its embeddings and output rows stay the target's."""

    def __init__(self, head: DraftHead, recipe: Recipe) -> None:
        self._head, self._recipe = head, recipe
        self._optimizer = HeadOptimizer(head)
        self._num_updates = 0

    def train(self, lessons: Sequence[Lesson], on_progress: Callable[[float, float], None]) -> int:
        """Train for the recipe's epochs; `on_progress` gets the share that is done and the loss. Returns the steps taken."""
        recipe = self._recipe
        torch.manual_seed(recipe.seed)
        rng = random.Random(recipe.seed)
        in_epoch = sum(len(_rows(lesson, 1, recipe.prompt_share)) for lesson in lessons)
        num_steps, num_rows, total = 0, 0, recipe.epochs * in_epoch
        while num_rows < total:
            unrolled, before = self._unrolled(num_rows / total), num_rows
            for batch in batches(lessons, recipe.batch_rows, unrolled, recipe.prompt_share, rng):
                done = num_rows / total
                if done >= 1.0 or self._unrolled(done) != unrolled:
                    break
                loss = self.step(batch, rate=min(1.0, (num_steps + 1) / 30) * _decay(done), is_sampled=done < 0.85)
                num_steps, num_rows = num_steps + 1, num_rows + len(batch.favourites_RS)
                on_progress(done, loss)
            if num_rows == before:
                break  # the texts are too short to unroll so far
        return num_steps

    def _unrolled(self, done: float) -> int:
        return min(self._recipe.max_steps, 1 if done < 0.05 else 2 if done < 0.4 else self._recipe.max_steps)

    def step(self, batch: Batch, rate: float, is_sampled: bool) -> float:
        """One step of the optimizer; returns the loss."""
        head, num_steps = self._head, batch.favourites_RS.shape[1]
        noisy_TF = batch.features_TF * (1 + self._recipe.noise * torch.randn_like(batch.features_TF))
        outs = head.unroll(noisy_TF, batch.following_TS, batch.spans, num_steps)
        truths = [Truth(batch.favourites_RS[:, s], batch.top_RSk[:, s], batch.probs_RSk[:, s]) for s in range(num_steps)]
        num_classes = len(head.head_VH)
        classes_C = sampled_classes(num_classes, truths) if is_sampled else torch.arange(num_classes)
        weights_S = step_weights(num_steps)
        gradients, total = [], 0.0
        for step, out in enumerate(outs):
            leaf = out.detach().requires_grad_()  # one step's logits at a time are in memory
            loss = weights_S[step] * row_losses(head, leaf, truths[step], classes_C, self._recipe.hard_share).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            gradients.append(leaf.grad)
            total += loss.item()
        torch.autograd.backward(outs, gradients)
        self._update(rate)
        return total

    def _update(self, rate: float) -> None:
        self._optimizer.clip(1.0)
        self._num_updates += 1
        for name, parameter in self._optimizer.parameters.items():
            full = self._recipe.map_rate if name in MAPS else self._recipe.layer_rate
            full = self._recipe.norm_rate if parameter.ndim == 1 else full
            self._optimizer.update(name, self._num_updates, full * rate)


def _decay(done: float) -> float:
    """Constant, then straight down."""
    return 1.0 if done < 0.1 else 0.02 + 0.98 * (1.0 - done) / 0.9
