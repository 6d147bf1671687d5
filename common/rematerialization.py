"""Which tensors to keep so that a backward pass can read all it needs: the fewest bytes, by a minimal cut. Knows no layer."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Collection

from common.activation_graph import Graph, Op

CHEAP_SHARE = 0.01
"""A bypass's linear is made again if that takes at most this share of the layer's forward pass."""
RECOMPUTABLE_LINEARS = ("gate_proj", "up_proj")
"""The backbone's linears that the runtime's backward pass can run again, with their bypasses, all or none."""


def keep(graph: Graph, needed: Collection[str], max_recompute_share: float = 0.0) -> frozenset[str]:
    """The tensors to keep so that all `needed` ones are at hand or can be made again, with the fewest elements.

    Elementwise operators, those that backward kernels run anyway, and small bypasses may be made again. Linears of the
    backbone only where they take at most `max_recompute_share` of the forward pass, and only if that saves something.
    """
    best = _cut(graph, needed, ())
    expensive = [op for op in graph.ops if op.name.partition(".")[0] in RECOMPUTABLE_LINEARS]
    if sum(op.flops for op in expensive) <= max_recompute_share * graph.flops:
        other = _cut(graph, needed, expensive)
        best = min(best, other, key=lambda kept: kept_width(graph, kept))
    return best


def kept_width(graph: Graph, kept: Collection[str]) -> int:
    """Elements per token of kept tensors; those in the KV cache are there anyway."""
    return sum(graph.tensors[name].width for name in kept if not graph.tensors[name].in_cache)


def made_again(graph: Graph, needed: Collection[str], kept: Collection[str]) -> frozenset[str]:
    """The tensors that must be made again. Raises ValueError if one depends on a tensor that is not kept and not made."""
    found: set[str] = set()
    work = [name for name in needed if name not in kept]
    while work:
        name = work.pop()
        if name in found:
            continue
        found.add(name)
        producer = graph.producer(name)
        if producer is None:
            raise ValueError(f"{name} is neither kept nor made")
        work += [source for source in producer.inputs if source not in kept]
    return frozenset(found)


def is_cheap(op: Op, graph: Graph) -> bool:
    """Whether an operator may run again without being asked for."""
    if op.kind != "linear" or op.in_backward_kernel:
        return True
    return op.is_trained and op.flops <= CHEAP_SHARE * graph.flops


def _cut(graph: Graph, needed: Collection[str], extra: Collection[Op]) -> frozenset[str]:
    """Of all cheapest cuts the one next to the needed tensors: it makes the fewest tensors again.

    Each tensor is an edge (before, after) that costs its width to cut. Tensors that only the forward pass can make hang
    on the source. A fused group is one edge, since it is kept whole.
    """
    capacity: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def connect(start: str, end: str, width: float) -> None:
        capacity[start][end] += width
        capacity[end][start] += 0

    seen: set[str] = set()
    for name, tensor in graph.tensors.items():
        node = tensor.group or name
        if node not in seen:
            seen.add(node)
            members = [other for other in graph.tensors.values() if (other.group or other.name) == node]
            is_fixed = any(other.is_streamed or other.is_overwritten for other in members)
            connect(f"{node}<", f"{node}>", math.inf if is_fixed else kept_width(graph, [other.name for other in members]))
        producer = graph.producer(name)
        if producer is None or not (is_cheap(producer, graph) or producer in extra):
            connect("source", f"{node}<", math.inf)
        else:
            for source in producer.inputs:
                connect(f"{graph.tensors[source].group or source}>", f"{node}<", math.inf)
    for name in needed:
        connect(f"{graph.tensors[name].group or name}>", "sink", math.inf)
    _saturate(capacity)
    near_sink = _reaching(capacity, "sink")
    cut = {node for node in seen if f"{node}<" not in near_sink and f"{node}>" in near_sink}
    return frozenset(name for name, tensor in graph.tensors.items() if (tensor.group or name) in cut)


def _saturate(capacity: dict[str, dict[str, float]]) -> None:
    """Push flow from source to sink until no path is left (Edmonds-Karp); leaves the residual capacities."""
    for _ in itertools.count():
        before = {"source": ""}
        queue = deque(["source"])
        while queue and "sink" not in before:
            node = queue.popleft()
            for end, left in capacity[node].items():
                if left > 0 and end not in before:
                    before[end] = node
                    queue.append(end)
        if "sink" not in before:
            return
        path = ["sink"]
        while before[path[-1]]:
            path.append(before[path[-1]])
        edges = list(zip(path[1:], path[:-1], strict=True))
        flow = min(capacity[start][end] for start, end in edges)
        if flow == math.inf:
            raise ValueError("a needed tensor can be neither kept nor made again")
        for start, end in edges:
            capacity[start][end] -= flow
            capacity[end][start] += flow


def _reaching(capacity: dict[str, dict[str, float]], target: str) -> set[str]:
    """The nodes with a residual path to the target."""
    ends: dict[str, list[str]] = defaultdict(list)
    for start, neighbours in capacity.items():
        for end, left in neighbours.items():
            if left > 0:
                ends[end].append(start)
    found, queue = {target}, deque([target])
    while queue:
        for start in ends[queue.popleft()]:
            if start not in found:
                found.add(start)
                queue.append(start)
    return found
