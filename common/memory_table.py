"""The memory of a training sequence's activations in four stages, tensor by tensor. Knows no model file, prints nothing.

unpruned: every tensor of the layer graph and a gradient of each, as a static allocator gives them place.
+ pruning: tensors and gradients that no trained weight needs are gone.
+ rematerialization: of the tensors, those that can cheaply be made again too; what is made again takes place for one layer.
+ token-level: the backward pass holds gradients, and what it makes again, of one window in one layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from common.activation_graph import Graph, head_graph, layer_graph
from common.activation_plan import MAX_WINDOW_TOKENS, ActivationPlan, LayerPlan
from common.bypasses import LayerBypasses
from common.reverse_autodiff import gradient_names, prune, read_tensors, reverse

STAGES = ("unpruned", "+ pruning", "+ rematerialization", "+ token-level")
Bytes = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One tensor's bytes at each stage, all layers together. `width` is elements per token of a layer; 0 where it varies."""

    name: str
    width: int
    num_bytes: Bytes


@dataclass(frozen=True, kw_only=True)
class MemoryTable:
    """`forward` rows are activations; `backward` rows gradients and what the backward pass works on."""

    forward: tuple[MemoryRow, ...]
    backward: tuple[MemoryRow, ...]

    @property
    def forward_total(self) -> Bytes:
        """Activations alone."""
        return _sum([row.num_bytes for row in self.forward])

    @property
    def total(self) -> Bytes:
        """Everything."""
        return _sum([row.num_bytes for row in (*self.forward, *self.backward)])


def saved_share(num_bytes: Bytes) -> float:
    """How much less the last stage takes than the first, of 1."""
    return 1 - num_bytes[-1] / num_bytes[0]


def memory_table(plan: ActivationPlan, bypasses: Sequence[LayerBypasses], num_tokens: int, dtype_bytes: int) -> MemoryTable:
    """The table for one sequence of `num_tokens`."""
    window = min(MAX_WINDOW_TOKENS, num_tokens)
    per_token = num_tokens * dtype_bytes
    graphs = [layer_graph(plan.shape, found, num_tokens) for found in bypasses]
    layers = list(zip(graphs, plan.layers, strict=True))
    head = head_graph(plan.shape)
    head_live = prune(reverse(head), head, wants_input=True)
    is_trained = plan.lowest < plan.shape.num_layers
    head_read = read_tensors(head_live) if is_trained else frozenset[str]()
    forward: dict[str, MemoryRow] = {}
    for graph, layer in layers:
        _add_layer(forward, graph, layer, per_token)
    for name in ("hidden", "normed", "logits"):
        width = head.tensors[name].width
        kept = width * per_token * (name in head_read)
        forward[name] = MemoryRow(name=name, width=width, num_bytes=(width * per_token, kept, kept, 0))
    every = sum(_width(graph, graph.tensors) for graph in graphs) + _width(head, ("hidden", "normed", "logits"))
    live = [_width(graph, gradient_names(layer.live, graph)) for graph, layer in layers]
    again = max(_width(graph, layer.made_again) for graph, layer in layers)
    head_gradients = _width(head, gradient_names(head_live, head) - {"loss"}) * is_trained
    pruned = (sum(live) + head_gradients) * per_token
    backward = {
        "gradients": (every * per_token, pruned, pruned, max(live) * window * dtype_bytes),
        "made again": (0, 0, again * per_token, again * window * dtype_bytes),
        "dk, dv sums": (0, 0, 0, plan.accumulator_bytes(num_tokens, dtype_bytes) * is_trained),
        "dx": (0, 0, 0, plan.shape.hidden_size * per_token * is_trained),
    }
    return MemoryTable(
        forward=tuple(forward.values()),
        backward=tuple(MemoryRow(name=name, width=0, num_bytes=num_bytes) for name, num_bytes in backward.items()),
    )


def _add_layer(rows: dict[str, MemoryRow], graph: Graph, layer: LayerPlan, per_token: int) -> None:
    for name, tensor in graph.tensors.items():
        if tensor.is_overwritten:
            continue
        size = tensor.width * per_token
        is_kept = name in layer.kept or tensor.in_cache
        is_read = name in layer.needed or tensor.in_cache
        num_bytes = (size, size * is_read, size * is_kept, size * is_kept)
        before = rows.get(name)
        if before is not None:
            num_bytes = _sum([before.num_bytes, num_bytes])
        rows[name] = MemoryRow(name=name, width=tensor.width, num_bytes=num_bytes)


def _width(graph: Graph, names: Collection[str]) -> int:
    return sum(graph.tensors[name].width for name in names if not graph.tensors[name].is_overwritten)


def _sum(rows: Sequence[Bytes]) -> Bytes:
    first, second, third, fourth = (sum(column) for column in zip(*rows, strict=True))
    return first, second, third, fourth
