"""States of a tensor over the ranks of a tensor-parallel group, and the operators between them (FlexLLM 5.1). Knows no model.

A tensor is [replica, tokens, features]; each dimension is whole `-`, partitioned `|`, replicated `=` or a partial sum `+`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """The states that a bypass meets."""

    REPLICATED = "[=,-,-]"
    TOKENS = "[-,|,-]"
    FEATURES = "[-,-,|]"
    PARTIAL = "[+,-,-]"

    @property
    def gradient(self) -> State:
        """The state that the gradient has by itself: ranks that used one value each hold a share of its gradient."""
        return _GRADIENTS.get(self, self)


_GRADIENTS = {State.REPLICATED: State.PARTIAL, State.PARTIAL: State.REPLICATED}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One legal way to run an operator: states of input, weight and output. `number` is that of FlexLLM's figure.

    `weight` is [replica, out, in]; its partitioned dimension is `|`.
    """

    number: int
    source: State
    weight: str
    output: State
    splits_work: bool
    splits_weight: bool


LINEAR_RULES = (
    Rule(number=1, source=State.REPLICATED, weight="[=,-,-]", output=State.REPLICATED, splits_work=False, splits_weight=False),
    Rule(number=2, source=State.FEATURES, weight="[-,-,|]", output=State.PARTIAL, splits_work=True, splits_weight=True),
    Rule(number=3, source=State.TOKENS, weight="[=,-,-]", output=State.TOKENS, splits_work=True, splits_weight=False),
    Rule(number=4, source=State.REPLICATED, weight="[-,|,-]", output=State.FEATURES, splits_work=True, splits_weight=True),
    Rule(number=5, source=State.PARTIAL, weight="[=,-,-]", output=State.PARTIAL, splits_work=False, splits_weight=False),
)
"""1 to 4 are the figure's. 5 holds because a linear of a sum is the sum of linears: partial sums go through as they are."""
ELEMENTWISE_RULES = (
    Rule(number=1, source=State.REPLICATED, weight="-", output=State.REPLICATED, splits_work=False, splits_weight=False),
    Rule(number=2, source=State.FEATURES, weight="-", output=State.FEATURES, splits_work=True, splits_weight=True),
    Rule(number=3, source=State.TOKENS, weight="-", output=State.TOKENS, splits_work=True, splits_weight=False),
)
"""Activation functions, and scales with a weight per feature. A function of a sum is not the sum of functions."""


@dataclass(frozen=True, kw_only=True)
class Transition:
    """An operator that changes a state. `share` is what a rank sends of the whole tensor's bytes (ring algorithms)."""

    name: str
    share: float


def transition(source: State, target: State, num_ranks: int) -> Transition | None:
    """What leads from one state to another; no name where nothing is to be done, None where nothing leads there."""
    if source is target:
        return Transition(name="", share=0.0)
    found = _TRANSITIONS.get((source, target))
    if found is None:
        return None
    name, factor = found
    ring = (num_ranks - 1) / num_ranks
    return Transition(name=name, share={"none": 0.0, "once": ring, "twice": 2 * ring, "part": ring / num_ranks}[factor])


_TRANSITIONS = {
    (State.REPLICATED, State.TOKENS): ("Partition(tokens)", "none"),
    (State.REPLICATED, State.FEATURES): ("Partition(features)", "none"),
    (State.TOKENS, State.REPLICATED): ("All-Gather", "once"),
    (State.FEATURES, State.REPLICATED): ("All-Gather", "once"),
    (State.TOKENS, State.FEATURES): ("All-to-All", "part"),
    (State.FEATURES, State.TOKENS): ("All-to-All", "part"),
    (State.PARTIAL, State.REPLICATED): ("All-Reduce", "twice"),
    (State.PARTIAL, State.TOKENS): ("Reduce-Scatter", "once"),
    (State.PARTIAL, State.FEATURES): ("Reduce-Scatter", "once"),
}
"""(from, to): the operator's name and its volume. The gradient takes the way back at the same volume."""
