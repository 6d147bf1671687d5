"""Reverse autodiff of a layer's graph, and what pruning leaves (FlexLLM 5.2). Knows names and who reads what; no bytes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from common.activation_graph import Graph, Op

INPUT_READS: dict[str, tuple[tuple[int | str, ...], ...]] = {
    "linear": ((),),
    "add": ((), ()),
    "norm": ((0,),),
    "rope": ((),),
    "scores": ((1,), (0,)),
    "softmax": (("out",),),
    "mix": ((1,), (0,)),
    "silu": ((0,),),
    "relu": (("out",),),
    "tanh": (("out",),),
    "gelu": ((0,),),
    "multiply": ((1,), (0,)),
    "scale": ((),),
    "loss": ((0,),),
}
"""By kind and input: the forward tensors (numbers of inputs, or the output) that this input's gradient is computed from."""
WEIGHT_READS: dict[str, int] = {"linear": 0, "norm": 0, "scale": 0}
"""By kind: the input that the weight's gradient is computed from."""


@dataclass(frozen=True, kw_only=True)
class GradOp:
    """Computes (a share of) one gradient from that of `op`'s output and from the forward tensors `reads`."""

    op: Op
    output: str
    reads: frozenset[str]

    @property
    def grad_input(self) -> str:
        """The gradient that comes from above."""
        return gradient(self.op.output)


def gradient(tensor: str) -> str:
    """The name of a tensor's gradient."""
    return f"d:{tensor}"


def weight_gradient(op: Op) -> str:
    """The name of the gradient of an operator's weight."""
    return f"dW:{op.name}"


def reverse(graph: Graph) -> list[GradOp]:
    """All gradients of all tensors and weights, frozen or not, last operator first."""
    found = []
    for op in reversed(graph.ops):
        for source, reads in zip(op.inputs, INPUT_READS[op.kind], strict=True):
            names = frozenset(op.output if read == "out" else op.inputs[int(read)] for read in reads)
            found.append(GradOp(op=op, output=gradient(source), reads=names))
        if op.has_weight:
            found.append(GradOp(op=op, output=weight_gradient(op), reads=frozenset({op.inputs[WEIGHT_READS[op.kind]]})))
    return found


def prune(grad_ops: Collection[GradOp], graph: Graph, *, wants_input: bool) -> list[GradOp]:
    """The operators that some trained weight needs, or, with `wants_input`, the gradient of the graph's input.

    What only frozen weights asked for is gone, and so is everything below the lowest trained weight.
    """
    goals = {weight_gradient(op) for op in graph.ops if op.is_trained}
    if wants_input:
        goals.add(gradient(graph.input))
    wanted, kept = set(goals), []
    for grad_op in sorted(grad_ops, key=lambda grad_op: graph.ops.index(grad_op.op)):
        if grad_op.output in wanted:
            wanted.add(grad_op.grad_input)
            kept.append(grad_op)
    kept.reverse()
    return kept


def read_tensors(grad_ops: Collection[GradOp]) -> frozenset[str]:
    """The forward tensors that these operators read: what must be kept, or made again."""
    return frozenset(name for grad_op in grad_ops for name in grad_op.reads)


def gradient_names(grad_ops: Collection[GradOp], graph: Graph) -> frozenset[str]:
    """The tensors of the graph that these operators make, or read, a gradient of."""
    names = {grad_op.output for grad_op in grad_ops} | {grad_op.grad_input for grad_op in grad_ops}
    return frozenset(name for name in graph.tensors if gradient(name) in names)
