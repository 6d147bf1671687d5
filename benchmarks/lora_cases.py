"""The GPU benchmark's cases of low-rank updates: one linear's, and what they add to all linears of a layer. Knows no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from benchmarks.kernel_case import Case, Goal, Randn, Sizes
from kernels import reference
from kernels.segments import LoraSegment
from kernels.triton_ops.lora_tables import LoraTables, segment_tables
from kernels.triton_ops.segmented_lora import segmented_lora, segmented_lora_gradients

SHARE = Goal("over_peer", 0.05)


def linear_cases(num_rows: int, num_adapters: int, sizes: Sizes, randn: Randn) -> Iterator[Case]:
    """The update of a square linear, and its input's gradient."""
    hidden, rank = sizes.hidden, sizes.rank
    x, y, base = randn(num_rows, hidden), randn(num_rows, hidden), randn(hidden, hidden)
    segments = _segments(num_rows, num_adapters, hidden, (hidden,), rank, randn)
    tables = segment_tables(segments)

    def input_gradient(dx: Tensor, dy: Tensor, own: object) -> None:
        segmented_lora_gradients(dx, dy, None, None, tables, hidden)

    num_bytes = (3 * x.numel() + num_adapters * 2 * rank * hidden) * x.element_size()
    shape = f"{num_rows} rows, {num_adapters} adapters, rank {rank}, {hidden} -> {hidden}"
    yield Case(
        kernel="segmented_lora", shape=shape, num_bytes=num_bytes, peers={"base GEMM": lambda: x @ base.mT},
        run=lambda: _from_zero(segmented_lora, y, x, tables),
        oracle=lambda: _from_zero(reference.segmented_lora, y, x, segments),
        timed=lambda: segmented_lora(y, x, tables), are_peers_checked=False,
    )  # fmt: skip
    yield Case(
        kernel="segmented_lora_backward", shape=shape, num_bytes=num_bytes, peers={"base GEMM": lambda: x @ base},
        run=lambda: _from_zero(input_gradient, y, x, tables),
        oracle=lambda: _from_zero(reference.segmented_lora_backward, y, x, segments),
        timed=lambda: input_gradient(y, x, tables), are_peers_checked=False,
    )  # fmt: skip


class _Linear(NamedTuple):
    x_TI: Tensor
    base_OI: Tensor
    segments: list[LoraSegment]
    tables: list[LoraTables]


def layer_case(num_rows: int, num_adapters: int, sizes: Sizes, randn: Randn) -> Case:
    """A layer's four linears with the updates of all their targets, against the linears alone."""
    q, k, hidden, inner = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.hidden, sizes.intermediate
    linears = []
    for num_in, targets in ((hidden, (q, k, k)), (q, (hidden,)), (hidden, (inner, inner)), (inner, (hidden,))):
        segments = _segments(num_rows, num_adapters, num_in, targets, sizes.rank, randn)
        base = randn(sum(targets), num_in) / num_in**0.5
        linears.append(_Linear(randn(num_rows, num_in), base, segments, segment_tables(segments)))

    def alone() -> list[Tensor]:
        return [linear.x_TI @ linear.base_OI.mT for linear in linears]

    def ours() -> tuple[Tensor, ...]:
        outputs = alone()
        for y, linear in zip(outputs, linears, strict=True):
            segmented_lora(y, linear.x_TI, linear.tables)
        return tuple(outputs)

    def oracle() -> tuple[Tensor, ...]:
        outputs = alone()
        for y, linear in zip(outputs, linears, strict=True):
            reference.segmented_lora(y, linear.x_TI, linear.segments)
        return tuple(outputs)

    bases = [linear.base_OI for linear in linears]
    return Case(
        kernel="linears and segmented_lora", shape=f"a layer, {num_rows} rows, {num_adapters} adapters, rank {sizes.rank}",
        run=ours, oracle=oracle, peers={"linears alone": lambda: alone()[0]}, are_peers_checked=False, goal=SHARE,
        num_bytes=sum(base.nbytes for base in bases), num_flops=2 * num_rows * sum(base.numel() for base in bases),
    )  # fmt: skip


def _segments(
    num_rows: int, num_adapters: int, num_in: int, targets: tuple[int, ...], rank: int, randn: Randn
) -> list[LoraSegment]:
    """Equal runs of rows; a linear's targets lie side by side."""
    edges = [num_rows * i // num_adapters for i in range(num_adapters + 1)]
    columns = [sum(targets[:i]) for i in range(len(targets))]
    return [
        LoraSegment(
            start=edges[i], end=edges[i + 1], scale=2.0, column=column, a_RI=randn(rank, num_in) / num_in**0.5,
            b_OR=randn(num_out, rank) / rank**0.5,
        )
        for i in range(num_adapters)
        for num_out, column in zip(targets, columns, strict=True)
    ]  # fmt: skip


def _from_zero(op: Callable[..., None], y: Tensor, x: Tensor, segments: object) -> tuple[Tensor, ...]:
    """The update alone; timed calls go on adding to the same rows."""
    y.zero_()
    op(y, x, segments)
    return (y.clone(),)
