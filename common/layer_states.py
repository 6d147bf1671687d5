"""The states of a layer's tensors over the ranks of a tensor-parallel group, bypasses included. Knows no size and no cost."""

from __future__ import annotations

from collections.abc import Mapping

from common.activation_graph import Graph
from common.bypasses import LayerBypasses
from common.parallel_plan import ROW_PARALLEL, ParallelPlan, surroundings
from common.peft_folder import TARGETS
from common.tensor_states import State


def layer_states(graph: Graph, bypasses: LayerBypasses, plans: Mapping[str, ParallelPlan]) -> dict[str, State]:
    """The state of each tensor as its operator leaves it; `plans` has the chosen one of each bypass, by target.

    The backbone reduces a partial sum where it adds it to the residual, which is whole on every rank.
    """
    states = {graph.input: State.REPLICATED}
    steps = {target: iter(plan.states) for target, plan in plans.items()}
    for op in graph.ops:
        target, _, part = op.name.partition(".")
        if op.name in TARGETS:
            states[op.output] = State.PARTIAL if target in ROW_PARALLEL else State.FEATURES
        elif target in TARGETS:
            states[op.output] = surroundings(bypasses[target]).target if part == "sum" else next(steps[target])
        else:
            states[op.output] = states[op.inputs[0]]
    return states
