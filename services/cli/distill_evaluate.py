"""How good a drafter is on texts that it was not trained on: right tokens per depth and workload. Knows no files."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels.drafting.head import DraftHead
from services.cli.distill_train import Lesson, batches

NUM_TOP = (1, 4)
EVALUATION_ROWS = 1500


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Of one workload: `shares[n][d]` is how often the target's token at depth d + 1 is among the drafter's first n, given that
    the path to it was right."""

    num_rows: int
    shares: dict[int, list[float]]

    @property
    def chain_tokens(self) -> float:
        """Mean tokens per verification of chains of the evaluated depth, the target's own token included."""
        total, right = 1.0, 1.0
        for share in self.shares[1]:
            right *= share
            total += right
        return total


@torch.inference_mode()
def evaluate(head: DraftHead, lessons: Sequence[Lesson], max_depth: int) -> dict[str, Acceptance]:
    """Acceptance by kind of text, in answers only."""
    by_kind: dict[str, list[Lesson]] = defaultdict(list)
    for lesson in lessons:
        by_kind[lesson.trace.example.kind].append(lesson)
    found = {}
    for kind, own in sorted(by_kind.items()):
        hits = [_hits(head, own, max_depth, num_top) for num_top in NUM_TOP]
        if len(hits[0]):
            shares = {n: hits_RS.float().mean(0).tolist() for n, hits_RS in zip(NUM_TOP, hits, strict=True)}
            found[kind] = Acceptance(len(hits[0]), shares)
    return found


def _hits(head: DraftHead, lessons: Sequence[Lesson], max_depth: int, num_top: int) -> Tensor:
    """Bool [R, S]: whether the favourite is among the first ones; a token outside of the vocabulary never is."""
    found = [torch.empty(0, max_depth, dtype=torch.bool)]
    other = len(head.head_VH) - 1
    for batch in batches(lessons, EVALUATION_ROWS, max_depth, prompt_share=0.0):
        outs = head.unroll(batch.features_TF, batch.following_TS, batch.spans, max_depth)
        tops = [head.logits(out).topk(num_top, dim=1).indices for out in outs]
        truth_RS = batch.favourites_RS
        found.append(
            torch.stack([(top == truth_RS[:, [s]]).any(1) & (truth_RS[:, s] != other) for s, top in enumerate(tops)], 1)
        )
    return torch.cat(found)


def describe(found: Mapping[str, Acceptance]) -> str:
    """What a card says of it."""
    depths = max((len(each.shares[NUM_TOP[0]]) for each in found.values()), default=0)
    rows = [
        f"| {kind} | " + " | ".join(_shares(each.shares[n]) for n in NUM_TOP) + f" | {each.chain_tokens:.2f} |"
        for kind, each in found.items()
    ]
    header = "| workload | " + " | ".join(f"top-{n}" for n in NUM_TOP) + " | tokens per verified chain |"
    return (
        f"Of {sum(each.num_rows for each in found.values()):,} positions of greedy answers to prompts that were held out, the"
        " target's next token was among the drafter's first\n"
        f"{' or '.join(map(str, NUM_TOP))}, given that the path to it was right, at depths 1 to {depths}:\n\n"
        + "\n".join([header, "|---" * (len(NUM_TOP) + 2) + "|", *rows])
    )


def _shares(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.2f}" for share in shares)
