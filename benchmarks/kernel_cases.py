"""What bench_kernels measures: each Triton kernel with its inputs, its oracle, its traffic and its work. Knows no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.segments import AttentionPlan, AttentionSegment, LoraSegment
from kernels.triton_ops.adamw import adamw
from kernels.triton_ops.attention_tables import attention_tables
from kernels.triton_ops.commit_kv import commit_kv
from kernels.triton_ops.linear_cross_entropy import linear_cross_entropy
from kernels.triton_ops.lora_tables import segment_tables
from kernels.triton_ops.ragged_attention import ragged_attention
from kernels.triton_ops.ragged_attention_backward import ragged_attention_backward
from kernels.triton_ops.rms_norm import rms_norm
from kernels.triton_ops.rope_and_cache import rope_and_cache
from kernels.triton_ops.segmented_lora import segmented_lora, segmented_lora_gradients
from kernels.triton_ops.silu_mul import silu_mul, silu_mul_backward

REL_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""dtype -> the norm of the error over the norm of the oracle, which may round as often as the kernel does."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Llama-3.1-8B's, unless said otherwise."""

    rows: tuple[int, ...] = (64, 4096)
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256
    context: int = 8192
    decodes: tuple[int, ...] = (1, 16, 64)
    prefill: int = 4096
    adapters: tuple[int, ...] = (1, 32)
    rank: int = 16
    layers: int = 32
    moved: int = 256


@dataclass(frozen=True, kw_only=True)
class Case:
    """`run` and `oracle` return the same tensors.

    `timed` is the call without what only the check needs, `peer` what torch offers, where they are not those two.
    """

    kernel: str
    shape: str
    run: Callable[[], tuple[Tensor, ...]]
    oracle: Callable[[], tuple[Tensor, ...]]
    timed: Callable[[], object] | None = None
    peer: Callable[[], object] | None = None
    num_bytes: int = 0
    num_flops: int = 0

    def check(self) -> None:
        """Raises ValueError unless the kernel does what the reference does."""
        for actual, expected in zip(self.run(), self.oracle(), strict=True):
            error = float((actual.double() - expected.double()).norm() / expected.double().norm())
            if not error <= REL_ERROR[actual.dtype]:
                raise ValueError(f"{self.kernel} {self.shape}: relative error {error:.2e}")


class Cases:
    """All cases for one type on one device; iterating makes the inputs of one after the other."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self._generator = torch.Generator(device).manual_seed(0)

    def __iter__(self) -> Iterator[Case]:
        for num_rows in self.sizes.rows:
            yield from self._rows(num_rows)
        for num_decodes in self.sizes.decodes:
            yield self._attention(f"decode x {num_decodes}", [(self.sizes.context - 1, 1)] * num_decodes)
        yield self._attention("prefill", [(0, self.sizes.prefill)])
        yield self._attention("decode, chunk, window", [(self.sizes.context // 2, 1)] * 16 + [(64, 512), (0, 256)])
        yield self._window()
        for num_adapters in self.sizes.adapters:
            yield from self._lora(num_adapters)
        yield self._commit()
        yield self._adamw()
        yield self._loss()

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32).to(self.dtype)

    def _rows(self, T: int) -> Iterator[Case]:
        sizes, itemsize = self.sizes, self.dtype.itemsize
        x, weight = self._randn(T, sizes.hidden), self._randn(sizes.hidden)
        yield Case(
            kernel="rms_norm", shape=f"{T} x {sizes.hidden}", num_bytes=2 * x.numel() * itemsize,
            run=lambda: (rms_norm(x, weight, 1e-5),), oracle=lambda: (reference.rms_norm(x, weight, 1e-5),),
            peer=lambda: F.rms_norm(x, (sizes.hidden,), weight, 1e-5),
        )  # fmt: skip
        gate_up, dz = self._randn(T, 2 * sizes.intermediate), self._randn(T, sizes.intermediate)
        yield Case(
            kernel="silu_mul", shape=f"{T} x {sizes.intermediate}", num_bytes=3 * dz.numel() * itemsize,
            run=lambda: (silu_mul(gate_up),), oracle=lambda: (reference.silu_mul(gate_up),),
        )  # fmt: skip
        yield Case(
            kernel="silu_mul_backward", shape=f"{T} x {sizes.intermediate}", num_bytes=5 * dz.numel() * itemsize,
            run=lambda: (silu_mul_backward(dz, gate_up),), oracle=lambda: (reference.silu_mul_backward(dz, gate_up),),
        )  # fmt: skip
        yield self._rope(T)

    def _rope(self, T: int) -> Case:
        N, K, D = self.sizes.heads, self.sizes.kv_heads, self.sizes.head_dim
        q, k, v = torch.split(self._randn(T, N + 2 * K, D), [N, K, K], dim=1)
        cos, sin, slots = self._randn(T, D), self._randn(T, D), torch.randperm(2 * T, device=self.device)[:T]
        caches = [torch.zeros(2 * T, K, D, dtype=self.dtype, device=self.device) for _ in range(4)]

        def run() -> tuple[Tensor, ...]:
            return rope_and_cache(q, k, v, cos, sin, caches[0], caches[1], slots), caches[0], caches[1]

        def oracle() -> tuple[Tensor, ...]:
            return reference.rope_and_cache(q, k, v, cos, sin, caches[2], caches[3], slots), caches[2], caches[3]

        num_bytes = (2 * (N + 2 * K) + 2) * T * D * self.dtype.itemsize
        return Case(kernel="rope_and_cache", shape=f"{T} x {N}+{K} x {D}", num_bytes=num_bytes, run=run, oracle=oracle)

    def _attention(self, name: str, batch: list[tuple[int, int]]) -> Case:
        """`batch` holds (context, rows); what a row cannot see is not counted as work."""
        N, K, D = self.sizes.heads, self.sizes.kv_heads, self.sizes.head_dim
        num_slots = sum(context + rows for context, rows in batch)
        free, segments, start = torch.randperm(num_slots, device=self.device), [], 0
        for context, rows in batch:
            slots, free = free[: context + rows], free[context + rows :]
            segments.append(AttentionSegment(start=start, end=start + rows, slots_L=slots))
            start += rows
        q, k, v = self._randn(start, N, D), self._randn(num_slots, K, D), self._randn(num_slots, K, D)
        tables, scale = attention_tables(AttentionPlan(segments), N // K, None), D**-0.5
        pairs = sum(rows * context + rows * (rows + 1) // 2 for context, rows in batch)
        context, rows = batch[0]
        dense = (q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None])
        return Case(
            kernel="ragged_attention", shape=f"{name}, context {context}, rows {start}",
            run=lambda: (ragged_attention(q, k, v, tables, scale),),
            oracle=lambda: (reference.ragged_attention(q, k, v, segments, scale),),
            peer=(lambda: F.scaled_dot_product_attention(*dense, is_causal=rows > 1, scale=scale, enable_gqa=True))
            if len(batch) == 1 else None,
            num_bytes=(2 * num_slots * K * D + 2 * start * N * D) * self.dtype.itemsize, num_flops=4 * N * D * pairs,
        )  # fmt: skip

    def _window(self) -> Case:
        """The window is the last quarter of the prefill's length."""
        N, K, D, end = self.sizes.heads, self.sizes.kv_heads, self.sizes.head_dim, self.sizes.prefill
        W, scale = end // 4, self.sizes.head_dim**-0.5
        do, q, k, v = self._randn(W, N, D), self._randn(W, N, D), self._randn(end, K, D), self._randn(end, K, D)
        segments = [AttentionSegment(start=0, end=W, slots_L=torch.randperm(end, device=self.device))]
        plan = AttentionPlan(segments)
        pairs = W * (end - W) + W * (W + 1) // 2
        return Case(
            kernel="ragged_attention_backward", shape=f"{W} rows, {end} keys", num_flops=14 * N * D * pairs,
            run=lambda: ragged_attention_backward(do, q, k, v, plan, scale),
            oracle=lambda: reference.ragged_attention_backward(do, q, k, v, segments, scale),
        )  # fmt: skip

    def _lora(self, num_adapters: int) -> Iterator[Case]:
        T, hidden, rank = 64, self.sizes.hidden, self.sizes.rank
        x, y, base = self._randn(T, hidden), self._randn(T, hidden), self._randn(hidden, hidden)
        edges = [T * i // num_adapters for i in range(num_adapters + 1)]
        segments = [
            LoraSegment(
                start=edges[i], end=edges[i + 1], scale=2.0, a_RI=self._randn(rank, hidden) / hidden**0.5,
                b_OR=self._randn(hidden, rank) / rank**0.5,
            )
            for i in range(num_adapters)
        ]  # fmt: skip
        tables = segment_tables(segments)

        def input_gradient(dx: Tensor, dy: Tensor, own: object) -> None:
            segmented_lora_gradients(dx, dy, None, None, tables, hidden)

        num_bytes = (3 * x.numel() + num_adapters * 2 * rank * hidden) * self.dtype.itemsize
        shape = f"{T} rows, {num_adapters} adapters, rank {rank}; peer: the base GEMM"
        yield Case(
            kernel="segmented_lora", shape=shape, num_bytes=num_bytes,
            run=lambda: _from_zero(segmented_lora, y, x, tables),
            oracle=lambda: _from_zero(reference.segmented_lora, y, x, segments),
            timed=lambda: segmented_lora(y, x, tables), peer=lambda: x @ base.mT,
        )  # fmt: skip
        yield Case(
            kernel="segmented_lora_backward", shape=shape, num_bytes=num_bytes,
            run=lambda: _from_zero(input_gradient, y, x, tables),
            oracle=lambda: _from_zero(reference.segmented_lora_backward, y, x, segments),
            timed=lambda: input_gradient(y, x, tables), peer=lambda: x @ base,
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
        T, hidden, V = 256, self.sizes.hidden, self.sizes.vocabulary
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


def _from_zero(op: Callable[..., None], y: Tensor, x: Tensor, segments: object) -> tuple[Tensor, ...]:
    """The update alone; timed calls go on adding to the same rows."""
    y.zero_()
    op(y, x, segments)
    return (y.clone(),)
