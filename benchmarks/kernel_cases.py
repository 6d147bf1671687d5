"""What bench_gpu checks and times: each Triton kernel with its inputs, its oracle, its peers and its goal. Knows no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention_cases import Part, attention_case, binary_tree, window_case
from benchmarks.kernel_case import Case, Goal, Sizes
from benchmarks.lora_cases import layer_case, linear_cases
from kernels import dropout, reference
from kernels.triton_ops.adamw import adamw
from kernels.triton_ops.commit_kv import commit_kv
from kernels.triton_ops.drop import drop
from kernels.triton_ops.linear_cross_entropy import linear_cross_entropy
from kernels.triton_ops.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from kernels.triton_ops.rope_and_cache import rope_and_cache, rope_backward
from kernels.triton_ops.silu_mul import silu_mul, silu_mul_backward
from kernels.triton_ops.tree_accept import tree_accept

BANDWIDTH = Goal("of_copy", 0.8)
"""For what is bound by memory, on inputs that fill the device."""
MATRIX_RATE = Goal("of_matmul", 0.5)


class Cases:
    """All cases for one type on one device; iterating makes the inputs of one after the other."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self._generator = torch.Generator(device).manual_seed(0)

    def __iter__(self) -> Iterator[Case]:
        for num_rows in self.sizes.rows:
            yield from self._rows(num_rows)
        yield from self._attention()
        for num_adapters in self.sizes.adapters:
            yield from linear_cases(self.sizes.lora_rows[0], num_adapters, self.sizes, self._randn)
            for num_rows in self.sizes.lora_rows:
                yield layer_case(num_rows, num_adapters, self.sizes, self._randn)
        yield self._accept()
        yield self._commit()
        yield self._adamw()
        yield self._loss()

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32).to(self.dtype)

    def _attention(self) -> Iterator[Case]:
        sizes, nodes = self.sizes, self.sizes.tree_nodes
        for num_decodes in sizes.decodes:
            parts = [Part(context=sizes.context - 1)] * num_decodes
            yield attention_case(f"decode x {num_decodes}", parts, sizes, self._randn, BANDWIDTH)
        for num_trees in sizes.decodes[:2]:
            parts = [Part(context=sizes.context - nodes, rows=nodes, parents=binary_tree(nodes))] * num_trees
            yield attention_case(f"trees x {num_trees}", parts, sizes, self._randn)
        yield attention_case("prefill", [Part(context=0, rows=sizes.prefill)], sizes, self._randn, MATRIX_RATE)
        chunks = [Part(context=sizes.context // 128, rows=sizes.prefill // 8), Part(context=0, rows=sizes.prefill // 16)]
        mixed = [Part(context=sizes.context // 2)] * sizes.mixed_decodes + chunks
        yield attention_case("decode, chunk, window", mixed, sizes, self._randn)
        yield window_case(sizes, self._randn)

    def _rows(self, T: int) -> Iterator[Case]:
        sizes, itemsize = self.sizes, self.dtype.itemsize
        goal = BANDWIDTH if max(sizes.rows) == T else None
        x, residual, weight = self._randn(T, sizes.hidden), self._randn(T, sizes.hidden), self._randn(sizes.hidden)
        yield Case(
            kernel="rms_norm", shape=f"{T} x {sizes.hidden}", num_bytes=2 * x.numel() * itemsize, goal=goal,
            run=lambda: (rms_norm(x, weight, 1e-5),), oracle=lambda: (reference.rms_norm(x, weight, 1e-5),),
            peers={"torch": lambda: F.rms_norm(x, (sizes.hidden,), weight, 1e-5)},
        )  # fmt: skip
        yield Case(
            kernel="add_rms_norm", shape=f"{T} x {sizes.hidden}", num_bytes=4 * x.numel() * itemsize, goal=goal,
            run=lambda: add_rms_norm(x, residual, weight, 1e-5),
            oracle=lambda: reference.add_rms_norm(x, residual, weight, 1e-5),
        )  # fmt: skip
        gate_up, dz = self._randn(T, 2 * sizes.intermediate), self._randn(T, sizes.intermediate)
        yield Case(
            kernel="silu_mul", shape=f"{T} x {sizes.intermediate}", num_bytes=3 * dz.numel() * itemsize, goal=goal,
            run=lambda: (silu_mul(gate_up),), oracle=lambda: (reference.silu_mul(gate_up),),
        )  # fmt: skip
        yield Case(
            kernel="silu_mul_backward", shape=f"{T} x {sizes.intermediate}", num_bytes=5 * dz.numel() * itemsize,
            run=lambda: (silu_mul_backward(dz, gate_up),), oracle=lambda: (reference.silu_mul_backward(dz, gate_up),),
        )  # fmt: skip
        dy = self._randn(T, sizes.hidden)
        yield Case(
            kernel="rms_norm_backward", shape=f"{T} x {sizes.hidden}", num_bytes=3 * x.numel() * itemsize,
            run=lambda: (rms_norm_backward(dy, x, weight, 1e-5),),
            oracle=lambda: (reference.rms_norm_backward(dy, x, weight, 1e-5),),
        )  # fmt: skip
        keys, rates = torch.arange(T, dtype=torch.int32, device=self.device), torch.full((T,), 0.1, device=self.device).double()
        yield Case(
            kernel="drop", shape=f"{T} x {sizes.hidden}", num_bytes=2 * x.numel() * itemsize,
            run=lambda: (drop(x, keys, rates, 3),), oracle=lambda: (dropout.drop(x, keys, rates, 3),),
        )  # fmt: skip
        yield self._rope(T, goal)
        yield self._rope_backward(T)

    def _rope(self, T: int, goal: Goal | None) -> Case:
        N, K, D = self.sizes.heads, self.sizes.kv_heads, self.sizes.head_dim
        q, k, v = torch.split(self._randn(T, N + 2 * K, D), [N, K, K], dim=1)
        cos, sin, slots = self._randn(T, D), self._randn(T, D), torch.randperm(2 * T, device=self.device)[:T]
        caches = [torch.zeros(2 * T, K, D, dtype=self.dtype, device=self.device) for _ in range(4)]

        def run() -> tuple[Tensor, ...]:
            return rope_and_cache(q, k, v, cos, sin, caches[0], caches[1], slots), caches[0], caches[1]

        def oracle() -> tuple[Tensor, ...]:
            return reference.rope_and_cache(q, k, v, cos, sin, caches[2], caches[3], slots), caches[2], caches[3]

        num_bytes = (2 * (N + 2 * K) + 2) * T * D * self.dtype.itemsize
        return Case(
            kernel="rope_and_cache", shape=f"{T} x {N}+{K} x {D}", num_bytes=num_bytes, run=run, oracle=oracle, goal=goal
        )

    def _rope_backward(self, T: int) -> Case:
        N, D = self.sizes.heads, self.sizes.head_dim
        dq, cos, sin = self._randn(T, N, D), self._randn(T, D), self._randn(T, D)
        return Case(
            kernel="rope_backward", shape=f"{T} x {N} x {D}", num_bytes=2 * (N + 1) * T * D * self.dtype.itemsize,
            run=lambda: (rope_backward(dq, cos, sin),), oracle=lambda: (reference.rope_backward(dq, cos, sin),),
        )  # fmt: skip

    def _accept(self) -> Case:
        """Every tree is a chain whose drafts are right up to a place of its own."""
        nodes, num_trees = self.sizes.tree_nodes, max(self.sizes.decodes)
        tokens = torch.arange(nodes).repeat(num_trees, 1)
        drawn = tokens + 1
        for tree in range(num_trees):
            drawn[tree, tree % nodes] = -1
        parents = torch.arange(-1, nodes - 1).repeat(num_trees, 1)
        flat = [x.flatten().to(self.device) for x in (tokens, parents, drawn)]
        starts = torch.arange(num_trees + 1, device=self.device) * nodes
        accepted = torch.arange(num_trees, device=self.device) % nodes
        return Case(
            kernel="tree_accept", shape=f"{num_trees} chains of {nodes}", num_bytes=5 * 8 * num_trees * nodes,
            run=lambda: (tree_accept(*flat, starts, nodes)[2],), oracle=lambda: (accepted,),
        )  # fmt: skip

    def _commit(self) -> Case:
        layers, moved, K, D = self.sizes.layers, self.sizes.moved, self.sizes.kv_heads, self.sizes.head_dim
        src, dst = torch.arange(1, moved + 1, device=self.device), torch.arange(moved, device=self.device)
        caches = [self._randn(moved + 1, K, D) for _ in range(2 * layers)]
        copies = [cache.clone() for cache in caches]

        def move(tensors: list[Tensor], op: Callable[..., None]) -> tuple[Tensor, ...]:
            op(tensors[:layers], tensors[layers:], src, dst)
            return tuple(tensors)

        num_bytes = 2 * 2 * layers * moved * K * D * self.dtype.itemsize
        ours, spec = (lambda: move(caches, commit_kv)), (lambda: move(copies, reference.commit_kv))
        return Case(kernel="commit_kv", shape=f"{layers} layers, {moved} rows", num_bytes=num_bytes, run=ours, oracle=spec)

    def _adamw(self) -> Case:
        size = 2 * self.sizes.rank * self.sizes.hidden * 7 * self.sizes.layers
        ours = [[self._randn(size).float()] for _ in range(3)] + [[self._randn(size).float().square()]]
        spec = [[tensors[0].clone()] for tensors in ours]

        def step(lists: list[list[Tensor]], op: Callable[..., None]) -> tuple[Tensor, ...]:
            op(*lists, step=5, learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
            return lists[0][0], lists[2][0], lists[3][0]

        run, oracle = (lambda: step(ours, adamw)), (lambda: step(spec, reference.adamw))
        return Case(kernel="adamw", shape=f"{size} fp32 parameters", num_bytes=7 * 4 * size, run=run, oracle=oracle)

    def _loss(self) -> Case:
        T, hidden, V = self.sizes.loss_rows, self.sizes.hidden, self.sizes.vocabulary
        x, head = self._randn(T, hidden) / hidden**0.5, self._randn(V, hidden)
        labels, weights = torch.randint(V, (T,), device=self.device), torch.ones(T, device=self.device)

        def result(op: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
            losses, _, dhidden = op(x, head, labels, weights)
            return losses, dhidden

        def fused(x: Tensor, head: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return linear_cross_entropy(x, lambda y: y @ head.mT, lambda dy: dy @ head, *rest)

        ours, spec = (lambda: result(fused)), (lambda: result(reference.linear_cross_entropy))
        num_flops = 4 * T * hidden * V
        return Case(kernel="linear_cross_entropy", shape=f"{T} x {hidden} x {V}", num_flops=num_flops, run=ours, oracle=spec)
