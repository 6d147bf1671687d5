"""What a draft tree must be. Knows no planner."""

from __future__ import annotations

from common.messages import DraftTree


def find_fault(tree: DraftTree) -> str | None:
    """What makes this no draft tree in BFS order, or None."""
    size = len(tree.tokens)
    if not size == len(tree.parents) == len(tree.probs) or size == 0:
        return "tokens, parents and probs differ in length or are empty"
    if tree.parents[0] != -1 or any(not 0 <= parent < i for i, parent in enumerate(tree.parents[1:], 1)):
        return "the root's parent must be -1, every other parent an earlier node"
    if any(later < earlier for earlier, later in zip(tree.parents, tree.parents[1:], strict=False)):
        return "the nodes are not in BFS order"
    edges = list(zip(tree.parents, tree.tokens, strict=True))
    if len(set(edges)) != size:
        return "two children of a node hold the same token"
    if any(not 0 < tree.probs[i] < tree.probs[parent] for i, parent in enumerate(tree.parents) if i):
        return "probabilities must be positive and fall along every path"
    if not 0 <= tree.num_required < size:
        return "num_required must not exceed the number of drafted nodes"
    return None
