"""Checking a draft tree against the tokens that the target model drew at its nodes. Knows ints only.

The target-only rule: at each node take the token drawn from the target's own distribution and descend if it is a child.
It is exact for any tree, also one chosen by probability, where the p/q rejection rule is biased (AdaServe dossier 4.3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from typing import Protocol

from common.messages import DraftTree


class InvalidTreeError(ValueError):
    """A draft tree is malformed, or belongs to another state of its sequence."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`path` are the accepted nodes (root excluded) in order; `tokens` the drawn tokens: one per accepted node and a bonus."""

    path: tuple[int, ...]
    tokens: tuple[int, ...]


class Drawn(Protocol):
    """The target's token after each node; only those on the accepted path are looked up."""

    def __getitem__(self, node: int, /) -> int: ...


def accept(tree_tokens: Seq[int], parents: Seq[int], drawn: Drawn) -> Verdict:
    """Walk the tree from its root; `drawn[i]` is the target's token after node i. At least one token comes back."""
    children = {(parents[node], tree_tokens[node]): node for node in range(len(tree_tokens) - 1, 0, -1)}
    node, path, tokens = 0, [], [drawn[0]]
    while (child := children.get((node, tokens[-1]))) is not None:
        path.append(child)
        tokens.append(drawn[child])
        node = child
    return Verdict(tuple(path), tuple(tokens))


def check_tree(tree: DraftTree, committed: Seq[int], vocab_size: int, max_nodes: int, max_length: int) -> None:
    """Raises InvalidTreeError unless the tree continues exactly these committed tokens, is well formed and ends in time.

    The model has `max_length` positions.
    """
    if tree.length != len(committed) or not tree.tokens or tree.tokens[0] != committed[-1]:
        raise InvalidTreeError("late: the sequence has moved on")
    if not len(tree.tokens) == len(tree.parents) == len(tree.probs):
        raise InvalidTreeError("tokens, parents and probs differ in length")
    if len(tree.tokens) - 1 > max_nodes:
        raise InvalidTreeError(f"{len(tree.tokens) - 1} nodes, the limit is {max_nodes}")
    if tree.parents[0] != -1 or any(not 0 <= parent < node for node, parent in enumerate(tree.parents) if node):
        raise InvalidTreeError("parents must precede their children")
    if any(not 0 <= token < vocab_size for token in tree.tokens):
        raise InvalidTreeError("unknown token")
    if any(not 0.0 <= prob <= 1.0 for prob in tree.probs) or tree.num_required < 0:
        raise InvalidTreeError("probs must be in [0, 1], num_required not negative")
    if len(committed) + max(depths(tree.parents)) > max_length:
        raise InvalidTreeError(f"deeper than the model's {max_length} positions")


def depths(parents: Seq[int]) -> list[int]:
    """Depth of each node; the root's is 0."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def prune(tree: DraftTree, num_nodes: int) -> DraftTree:
    """The tree with its `num_nodes` most probable nodes beside the root; ancestors stay, as they are more probable."""
    if num_nodes >= len(tree.tokens) - 1:
        return tree
    level = depths(tree.parents)
    ranked = sorted(range(1, len(tree.tokens)), key=lambda node: (-tree.probs[node], level[node], node))
    kept = [0, *sorted(_closed(ranked[:num_nodes], tree.parents))]
    index = {old: new for new, old in enumerate(kept)}
    return DraftTree(
        request_id=tree.request_id,
        length=tree.length,
        tokens=tuple(tree.tokens[node] for node in kept),
        parents=tuple(-1 if node == 0 else index[tree.parents[node]] for node in kept),
        probs=tuple(tree.probs[node] for node in kept),
        num_required=min(tree.num_required, num_nodes),
    )


def _closed(nodes: Seq[int], parents: Seq[int]) -> list[int]:
    """The nodes whose ancestors are all among them, in the given order (a planner may send probabilities that rise)."""
    chosen = set(nodes)
    closed = {0}
    for node in sorted(chosen):
        if parents[node] in closed:
            closed.add(node)
    return [node for node in nodes if node in closed]
