"""Draft trees for the tests of the executor: from one that knows the truth, from one that knows nothing, and by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from common.messages import DraftTree
from services.executor import sequences

Draft = Callable[[sequences.Sequence], DraftTree | None]
"""What a planner would send for a decoding sequence."""


def chain_tree(sequence: sequences.Sequence, tokens: Sequence[int], depth: int) -> DraftTree:
    """The sequence's next `depth` output tokens as a chain, padded with zeros; `tokens` are all its output."""
    nodes = [sequence.tokens[-1], *[*tokens[sequence.num_output :], *[0] * depth][:depth]]
    return make_tree(sequence.request_id, len(sequence.tokens), nodes, range(-1, depth))


def make_tree(request_id: str, length: int, tokens: Sequence[int], parents: Sequence[int], num_required: int = 0) -> DraftTree:
    """A tree whose nodes are the less probable the deeper and later they are."""
    probs: list[float] = []
    for node, parent in enumerate(parents):
        probs.append(1.0 if parent < 0 else probs[parent] * 0.95 - 1e-6 * node)
    return DraftTree(
        request_id=request_id,
        length=length,
        tokens=tuple(tokens),
        parents=tuple(parents),
        probs=tuple(probs),
        num_required=num_required,
    )


def grow_tree(
    sequence: sequences.Sequence, truth: Sequence[int], rng: random.Random, *, max_depth: int = 5, vocab_size: int = 97
) -> DraftTree:
    """A random tree in BFS order below the last token that holds up to `max_depth` tokens of `truth`, hidden among others."""
    tokens, parents, siblings = [sequence.tokens[-1]], [-1], set[tuple[int, int]]()
    frontier: list[tuple[int, int | None]] = [(0, 0)]
    for _ in range(max_depth):
        children: list[tuple[int, int | None]] = []
        for node, at in frontier:
            is_true = at is not None and at < len(truth)
            drafts = [(rng.randrange(vocab_size), False) for _ in range(rng.randint(0, 2))]
            if is_true and at is not None:
                drafts.insert(rng.randint(0, len(drafts)), (truth[at], True))
            for token, is_next in drafts:
                if (node, token) not in siblings and len(tokens) < 40:
                    siblings.add((node, token))
                    is_next = is_next or (is_true and at is not None and token == truth[at])
                    children.append((len(tokens), at + 1 if is_next and at is not None else None))
                    tokens.append(token)
                    parents.append(node)
        frontier = children
    return make_tree(sequence.request_id, len(sequence.tokens), tokens, parents)


def oracle_draft(truth: dict[str, list[int]], seed: int = 0, max_depth: int = 5) -> Draft:
    """Drafts that know how each request goes on."""
    rng = random.Random(seed)
    return lambda s: grow_tree(s, truth[s.request_id][s.num_output :], rng, max_depth=rng.randint(1, max_depth))


def junk_draft(seed: int = 0) -> Draft:
    """Well-formed drafts that know nothing."""
    rng = random.Random(seed)
    return lambda s: grow_tree(s, [], rng) if rng.random() < 0.8 else None
