"""The activations that training keeps of each layer, by graph pruning and rematerialization. Knows sizes and names; no tensor.

The executor's tape holds what the plan says, and `heddle explain memory` prints it (FlexLLM 5.2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from common.activation_graph import Graph, layer_graph
from common.bypasses import Bypass, LayerBypasses
from common.model_shape import ModelShape
from common.rematerialization import keep, made_again
from common.reverse_autodiff import GradOp, prune, read_tensors, reverse

MAX_WINDOW_TOKENS = 512
"""Rows that a backward pass goes through at once."""
MIN_WIDE_BYTES = 4
"""Sums over windows are kept in fp32 at least."""


@dataclass(frozen=True, kw_only=True)
class TapeTensor:
    """One kept tensor of a layer: [tokens, width]. Names are those of common/activation_graph.py, or a group's."""

    name: str
    width: int


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What becomes of a layer's activations: `tape` is kept; `needed` is read by the backward pass, some of it made again."""

    graph: Graph
    live: tuple[GradOp, ...]
    needed: frozenset[str]
    kept: frozenset[str]
    tape: tuple[TapeTensor, ...]

    @property
    def made_again(self) -> frozenset[str]:
        """Tensors that the backward pass computes anew, window by window."""
        return made_again(self.graph, self.needed, self.kept)


@dataclass(frozen=True, kw_only=True)
class ActivationPlan:
    """Layer by layer, what a training sequence keeps until its backward pass has left the layer."""

    shape: ModelShape
    layers: tuple[LayerPlan, ...]
    lowest: int
    """The lowest layer with a bypass; `num_layers` if there is none. Below it nothing is kept."""

    @property
    def tape_width(self) -> int:
        """Elements per token that the tape holds of all layers."""
        return sum(tensor.width for layer in self.layers for tensor in layer.tape)

    def accumulator_bytes(self, num_tokens: int, dtype_bytes: int) -> int:
        """Of the key and value gradients of one layer, into which windows add."""
        width = 2 * self.shape.num_kv_heads * self.shape.head_dim
        return width * num_tokens * max(dtype_bytes, MIN_WIDE_BYTES)


def plan_activations(shape: ModelShape, bypasses: Sequence[LayerBypasses], max_recompute_share: float = 0.0) -> ActivationPlan:
    """The plan for these bypasses, one mapping per layer.

    `max_recompute_share` is the part of the forward pass that may be run again to keep less (keep of rematerialization).
    """
    lowest = next((layer for layer, found in enumerate(bypasses) if found), shape.num_layers)
    layers = tuple(
        _plan_layer(shape, tuple(found.values()), layer > lowest, layer >= lowest, max_recompute_share)
        for layer, found in enumerate(bypasses)
    )
    return ActivationPlan(shape=shape, layers=layers, lowest=lowest)


@functools.lru_cache(maxsize=64)
def _plan_layer(
    shape: ModelShape, bypasses: tuple[Bypass, ...], wants_input: bool, is_trained: bool, max_recompute_share: float
) -> LayerPlan:
    """Layers that are alike share a plan. The graph is that of one token, so that a plan holds for every length."""
    graph = layer_graph(shape, {bypass.target: bypass for bypass in bypasses}, num_tokens=1)
    live = tuple(prune(reverse(graph), graph, wants_input=wants_input)) if is_trained else ()
    needed = read_tensors(live)
    kept = keep(graph, needed, max_recompute_share)
    return LayerPlan(graph=graph, live=live, needed=needed, kept=kept, tape=_tape(graph, kept))


def _tape(graph: Graph, kept: frozenset[str]) -> tuple[TapeTensor, ...]:
    """Kept tensors outside the cache, those of a group side by side."""
    widths: dict[str, int] = {}
    for name, tensor in graph.tensors.items():
        if name in kept and not tensor.in_cache:
            place = tensor.group or name
            widths[place] = widths.get(place, 0) + tensor.width
    return tuple(TapeTensor(name=name, width=width) for name, width in widths.items())
