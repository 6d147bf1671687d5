"""What a drafter is: it follows sequences and guesses how they go on. Knows no budget, no SLO and no executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

Key = tuple[str, str]
"""(executor_id, request_id) of a sequence."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """Candidate nodes of one sequence in BFS order, the root excluded.

    `parents` index into the pool and never fall, -1 is the root; `depths` count from 1; `probs` are the probabilities that the
    whole path to a node is accepted: in (0, 1) and falling along every path. No two children of a node are the same token.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    parents: list[int] = dataclasses.field(default_factory=list)
    depths: list[int] = dataclasses.field(default_factory=list)
    probs: list[float] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, depth: int, prob: float) -> int:
        """Append a node; returns its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(depth)
        self.probs.append(prob)
        return len(self.tokens) - 1


class FeatureNeed(NamedTuple):
    """Hidden states that a drafter wants of executors whose model has this fingerprint; see PlannerGranted."""

    fingerprint: str
    layers: tuple[int, ...]
    window: int


class DraftOrder(NamedTuple):
    """Draft for this sequence, at most `depth` tokens ahead: the best `width` nodes of a level are continued."""

    key: Key
    depth: int
    width: int


class Drafter(Protocol):
    """Follows any number of sequences. Unknown keys are a caller's error (KeyError), except to close.

    Its probabilities are its own belief: `MixedDrafter` corrects them by what the target accepts.
    """

    is_free: bool
    """Whether it computes no model, so that its drafts take next to no time."""

    def open(self, key: Key, tokens: Sequence[int], *, tenant: str = "", features: bytes = b"") -> None:
        """Follow a sequence that holds these tokens; replaces what was known under this key.

        Nothing of a sequence may show in drafts for another `tenant`. `features` are the target's hidden states that the
        drafter asked for, of the last tokens; empty for a drafter that asked for none, or where the executor has none.
        """

    def extend(self, key: Key, tokens: Sequence[int], *, features: bytes = b"") -> None:
        """The target model committed these tokens: they go on the sequence. `features` are of these, as in `open`."""

    def close(self, key: Key) -> None:
        """Forget the sequence."""

    def draft(self, orders: Sequence[DraftOrder]) -> list[Pool]:
        """One pool per order: all children of the nodes that are continued are candidates."""
