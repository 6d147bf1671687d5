"""Recorded answers drafted for once more, without a clock: what drafters can do. Knows no server and no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from services.executor.verify import accept, depths
from services.planner import trees
from services.planner.drafter import DraftOrder
from services.planner.mixed import MixedDrafter
from services.planner.selection import select_equally


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A text whose answer begins at `num_prompt`; `features` are the target's rows of its tokens, as in reports, or none."""

    tokens: tuple[int, ...]
    num_prompt: int
    features: bytes = b""


@dataclasses.dataclass
class Replayed:
    """What verifying drafts of some texts came to; a text's first token, which its prompt gives, is not counted."""

    num_texts: int = 0
    num_verifies: int = 0
    num_tokens: int = 0
    num_nodes: int = 0

    @property
    def tokens_per_verify(self) -> float:
        """As of `usage.slo`: the target's own token included."""
        return self.num_tokens / max(1, self.num_verifies)


def replay(drafter: MixedDrafter, texts: Sequence[Recorded], *, num_nodes: int, depth: int, width: int) -> Replayed:
    """Draft for each text as if it were decoded now, and verify the `num_nodes` likeliest nodes against how it goes on."""
    found = Replayed()
    for number, text in enumerate(texts):
        key, end, length = ("replay", str(number)), len(text.tokens), text.num_prompt + 1
        if length >= end:
            continue
        found.num_texts += 1
        row = len(text.features) // end
        first = max(0, length - 1 - (drafter.need.window if drafter.need else 0))
        drafter.open(key, text.tokens[:length], features=text.features[first * row : (length - 1) * row])
        while length < end:
            (pool,) = drafter.draft([DraftOrder(key, min(depth, end - length - 1), width)])
            chosen = select_equally(trees.join([pool]), 1, num_nodes).chosen.tolist()
            drafter.choose(key, chosen)
            root = text.tokens[length - 1]
            tree = trees.cut(pool, chosen, request_id=key[1], root=root, length=length, num_required=0)
            verdict = accept(tree.tokens, tree.parents, [text.tokens[length + level] for level in depths(tree.parents)])
            num_new = len(verdict.tokens)
            features = text.features[(length - 1) * row : (length - 1 + num_new) * row]
            drafter.extend(key, verdict.tokens, features=features)
            length += num_new
            found.num_verifies += 1
            found.num_tokens += num_new
            found.num_nodes += len(chosen)
        drafter.close(key)
    return found
