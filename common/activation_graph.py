"""The forward graph of one decoder layer with its bypasses: tensors, operators, their cost. Knows no gradient and no memory.

Every operator makes one tensor of [tokens, width]. Widths are elements per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from common.bypasses import Bypass, LayerBypasses
from common.model_shape import ModelShape

Kind = Literal[
    "linear", "add", "norm", "rope", "scores", "softmax", "mix", "silu", "relu", "tanh", "gelu", "multiply", "scale", "loss"
]
KEEPS_NO_OUTPUT = ("lora", "ia3_input")
"""Bypasses whose gradients do not read their linear's output."""
ELEMENTWISE_FLOPS = {"add": 1, "norm": 4, "rope": 3, "softmax": 5, "multiply": 1, "scale": 1, "loss": 5}
"""Per element of the output; activation functions take 5."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A value of the forward pass.

    `in_cache`: the KV cache holds it anyway. `is_streamed`: kernels never write it out whole, or overwrite it in place,
    so it can only be recomputed. `group`: tensors that lie side by side in one, which is kept whole.
    """

    name: str
    width: int
    in_cache: bool = False
    is_streamed: bool = False
    is_overwritten: bool = False
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operator. `flops` per token. `in_backward_kernel`: the kernel that reads its output for a gradient recomputes it."""

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    output: str
    flops: int
    has_weight: bool = False
    is_trained: bool = False
    in_backward_kernel: bool = False


@dataclass
class Graph:
    """Operators in the order in which they run; `input` is made outside."""

    input: str
    output: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Of a forward pass, per token."""
        return sum(op.flops for op in self.ops)

    def producer(self, name: str) -> Op | None:
        """The operator that makes a tensor; None for the input."""
        return next((op for op in self.ops if op.output == name), None)

    def add(
        self, kind: Kind, inputs: tuple[str, ...], output: Tensor, *, flops: int | None = None, name: str = "", **facts: bool
    ) -> str:
        """Append an operator; returns its output's name."""
        flops = ELEMENTWISE_FLOPS.get(kind, 5) * output.width if flops is None else flops
        self.tensors[output.name] = output
        self.ops.append(Op(name=name or output.name, kind=kind, inputs=inputs, output=output.name, flops=flops, **facts))
        return output.name


def layer_graph(shape: ModelShape, bypasses: LayerBypasses, num_tokens: int) -> Graph:
    """One layer over `num_tokens`; names as in services/executor/model.py: x, y, q, k, v, out, m, z, gate, up, h.

    A bypass's operators are called target.low, .active, .update, .sum or .scale.
    """
    hidden = shape.hidden_size
    graph = Graph(input="x", tensors={"x": Tensor(name="x", width=hidden)})
    build = _Layer(graph, shape, bypasses)
    graph.add("norm", ("x",), Tensor(name="y", width=hidden), has_weight=True)
    build.linear("q_proj", "y", "q_raw")
    build.linear("k_proj", "y", "k_raw")
    build.linear("v_proj", "y", "v", in_cache=True)
    build.rotate("q_raw", "q", in_cache=False)
    build.rotate("k_raw", "k", in_cache=True)
    q_width = shape.num_heads * shape.head_dim
    squares = shape.num_heads * num_tokens
    attention_flops = 2 * q_width * num_tokens
    scores, probs = (Tensor(name=name, width=squares, is_streamed=True) for name in ("scores", "probs"))
    graph.add("scores", ("q", "k"), scores, flops=attention_flops, in_backward_kernel=True)
    graph.add("softmax", ("scores",), probs, in_backward_kernel=True)
    graph.add("mix", ("probs", "v"), Tensor(name="out", width=q_width), flops=attention_flops, in_backward_kernel=True)
    o = build.linear("o_proj", "out", "o")
    graph.add("add", ("x", o), Tensor(name="m", width=hidden))
    graph.add("norm", ("m",), Tensor(name="z", width=hidden), has_weight=True)
    is_together = all(bypasses[name].method in KEEPS_NO_OUTPUT for name in ("gate_proj", "up_proj") if name in bypasses)
    group = "gate_up" if is_together else None
    gate = build.linear("gate_proj", "z", "gate", group=group)
    up = build.linear("up_proj", "z", "up", group=group)
    inner = shape.intermediate_size
    graph.add("silu", (gate,), Tensor(name="silu", width=inner, is_streamed=True))
    graph.add("multiply", ("silu", up), Tensor(name="h", width=inner))
    down = build.linear("down_proj", "h", "down")
    graph.output = graph.add("add", ("m", down), Tensor(name="next", width=hidden, is_overwritten=True))
    return graph


def head_graph(shape: ModelShape) -> Graph:
    """The frozen top of the model: final norm, logits, loss."""
    graph = Graph(input="hidden", tensors={"hidden": Tensor(name="hidden", width=shape.hidden_size)})
    graph.add("norm", ("hidden",), Tensor(name="normed", width=shape.hidden_size), has_weight=True)
    flops = 2 * shape.hidden_size * shape.vocab_size
    graph.add("linear", ("normed",), Tensor(name="logits", width=shape.vocab_size), flops=flops, has_weight=True)
    graph.output = graph.add("loss", ("logits",), Tensor(name="loss", width=1))
    return graph


class _Layer:
    """Adds linears with their bypasses."""

    def __init__(self, graph: Graph, shape: ModelShape, bypasses: LayerBypasses) -> None:
        self._graph, self._shape, self._bypasses = graph, shape, bypasses

    def rotate(self, source: str, name: str, *, in_cache: bool) -> None:
        width = self._graph.tensors[source].width
        if self._shape.has_head_norms:
            source = self._graph.add("norm", (source,), Tensor(name=f"{name}_normed", width=width), has_weight=True)
        self._graph.add("rope", (source,), Tensor(name=name, width=width, in_cache=in_cache))

    def linear(self, target: str, source: str, name: str, *, in_cache: bool = False, group: str | None = None) -> str:
        """The linear, and its bypass, if there is one; returns the name of what the layer goes on with, which is `name`."""
        num_in, num_out = self._shape.linears[target]
        bypass = self._bypasses.get(target)
        result = Tensor(name=name, width=num_out, in_cache=in_cache, group=group)
        if bypass is not None and bypass.method == "ia3_input":
            scaled = Tensor(name=f"{target}.ia3", width=num_in)
            source = self._graph.add("scale", (source,), scaled, name=f"{target}.scale", has_weight=True, is_trained=True)
            bypass = None
        is_lora = bypass is not None and bypass.method == "lora"
        base = result if bypass is None else Tensor(name=f"{name}_base", width=num_out, is_overwritten=is_lora)
        self._graph.add("linear", (source,), base, flops=2 * num_in * num_out, name=target, has_weight=True)
        if bypass is not None:
            self._bypass(bypass, source, base.name, result)
        return name

    def _bypass(self, bypass: Bypass, source: str, base: str, result: Tensor) -> None:
        graph, target, rank = self._graph, bypass.target, bypass.rank
        num_in, num_out = self._shape.linears[target]
        if bypass.method == "ia3_output":
            graph.add("scale", (base,), result, name=f"{target}.scale", has_weight=True, is_trained=True)
            return
        source = source if bypass.method == "lora" else base
        num_in = num_in if bypass.method == "lora" else num_out
        low = Tensor(name=f"{target}.low", width=rank)
        graph.add("linear", (source,), low, flops=2 * num_in * rank, has_weight=True, is_trained=True, in_backward_kernel=True)
        if bypass.method == "bottleneck":
            low = Tensor(name=f"{target}.active", width=rank)
            graph.add(_activation(bypass), (f"{target}.low",), low)
        update = Tensor(name=f"{target}.update", width=num_out, is_overwritten=True)
        graph.add("linear", (low.name,), update, flops=2 * rank * num_out, has_weight=True, is_trained=True)
        graph.add("add", (base, update.name), result, name=f"{target}.sum")


def _activation(bypass: Bypass) -> Kind:
    match bypass.activation:
        case "relu" | "tanh" | "silu" | "gelu":
            return bypass.activation
    raise ValueError(f"no activation {bypass.activation!r}")
