"""Which of a planner's trees reach the next pass: the rest is counted and dropped. Knows trees and sequences, no tensors."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from common.messages import DraftTrees
from services.executor.sequences import Sequence
from services.executor.verify import InvalidTreeError, check_tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeLimits:
    """Draft nodes, roots excluded: of one request's tree and of all trees of a pass (AdaServe's budget B)."""

    vocab_size: int
    max_length: int
    max_nodes: int
    max_total: int


def attach(message: DraftTrees, sequences: Mapping[str, Sequence], limits: TreeLimits, counters: Counter[str]) -> None:
    """Give each sequence the last of its trees. A tree that is late, malformed, for nobody who decodes, or more than what the
    trees before it leave of the total, costs nothing but itself."""
    num_nodes: dict[str, int] = {}
    for tree in message.trees:
        sequence = sequences.get(tree.request_id)
        if sequence is None or not sequence.is_decoding:
            counters["trees_orphaned"] += 1
            continue
        try:
            check_tree(tree, sequence.tokens, limits.vocab_size, limits.max_nodes, limits.max_length)
        except InvalidTreeError as error:
            counters["trees_late" if str(error).startswith("late") else "trees_invalid"] += 1
            continue
        others = sum(num_nodes.values()) - num_nodes.get(tree.request_id, 0)
        if others + len(tree.tokens) - 1 > limits.max_total:
            counters["trees_over_budget"] += 1
            continue
        sequence.tree, num_nodes[tree.request_id] = tree, len(tree.tokens) - 1
