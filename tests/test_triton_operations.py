"""The Triton kernels as torch's custom operations: what torch.compile and a recorded graph rely on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tests.triton_stage as stage
from kernels.segments import AttentionPlan, AttentionSegment, LoraSegment
from kernels.triton_ops import operations, tree_accept
from kernels.triton_ops.attention_tables import attention_tables
from kernels.triton_ops.lang import pointers, table
from kernels.triton_ops.lora_tables import segment_tables
from kernels.triton_ops.ragged_attention_backward import backward_tables
from tests.helpers import randn

T, H, N, K, D = 4, 16, 4, 2, 4


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return stage.put(randn(*shape, seed=seed), torch.float32)


def plan() -> AttentionPlan:
    slots = torch.arange(6, device=stage.DEVICE)
    return AttentionPlan([AttentionSegment(start=0, end=T, slots_L=slots)])


def attention() -> tuple[Any, ...]:
    tables = attention_tables(plan(), N // K, None)
    cache = tensor(9, K, D)
    return (
        tensor(T, N, D), cache, cache, tables.sizes, tables.work, tables.merges, tables.slots, tables.masks,
        tables.num_partials, True, False, False, 0.5, 0,
    )  # fmt: skip


def attention_backward() -> tuple[Any, ...]:
    tables, cache = backward_tables(plan(), N // K), tensor(9, K, D)
    q = tensor(T, N, D)
    return q, tensor(T, N, D, seed=1), cache, cache, tables.row_tiles, tables.key_tiles, tables.slots, False, 0.5


def lora() -> tuple[Any, ...]:
    segments = [LoraSegment(start=0, end=T, a_RI=tensor(2, H), b_OR=tensor(H, 2), scale=0.5)]
    own = segment_tables(segments)[0]
    return own.matrix, own.members, own.tiles, own.most_targets, own.most_outputs, own.rank, own.is_aligned


def lora_gradients() -> tuple[Any, ...]:
    matrix, members, tiles, *rest = lora()
    x = tensor(T, H)
    return tensor(T, H), tensor(T, H), x, [tensor(2, H)], [tensor(H, 2)], matrix, members, tiles, H, *rest


def moves() -> tuple[Any, ...]:
    caches = [tensor(4, K, D), tensor(4, K, D)]
    slots = torch.tensor([0, 1], device=stage.DEVICE)
    return caches, pointers(caches), slots, slots + 2


def adamw() -> tuple[Any, ...]:
    lists = [[tensor(8, seed=i)] for i in range(4)]
    lists[3][0].square_()
    blocks = table((0, 0, 8), lists[0][0].device)
    return *lists, [pointers(tensors) for tensors in lists], blocks, [0.9, 0.9, 0.9, 1e-8, 0.1, 1.0]


def tree() -> tuple[Any, ...]:
    nodes = torch.tensor([0, 1, 2], device=stage.DEVICE)
    return nodes, nodes - 1, nodes, torch.tensor([0, 3], device=stage.DEVICE), 3


ROTATIONS = (tensor(T, D, seed=1), tensor(T, D, seed=2))
CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "rms_norm": lambda: (tensor(T, H), tensor(H), 1e-5),
    "add_rms_norm": lambda: (tensor(T, H), tensor(T, H), tensor(H), 1e-5),
    "rms_norm_backward": lambda: (tensor(T, H), tensor(T, H), tensor(H), 1e-5),
    "silu_mul": lambda: (tensor(T, H),),
    "silu_mul_backward": lambda: (tensor(T, H), tensor(T, 2 * H)),
    "rope_and_cache": lambda: (
        tensor(T, N, D), tensor(T, K, D), tensor(T, K, D), *ROTATIONS, tensor(9, K, D), tensor(9, K, D),
        torch.arange(T, device=stage.DEVICE),
    ),
    "rope_backward": lambda: (tensor(T, N, D), *ROTATIONS),
    "ragged_attention": attention,
    "ragged_attention_backward": attention_backward,
    "segmented_lora": lambda: (tensor(T, H), tensor(T, H), *lora()),
    "segmented_lora_gradients": lora_gradients,
    "cross_entropy": lambda: (tensor(T, H), torch.arange(T, device=stage.DEVICE), tensor(T), True),
    "commit_kv": moves,
    "adamw": adamw,
    "drop": lambda: (tensor(T, H), torch.arange(T, dtype=torch.int32, device=stage.DEVICE), tensor(T).abs().double() / 9, 3),
    "tree_accept": tree,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_compiled_code_sees_the_operation(name: str) -> None:
    """Its schema tells what it writes, and its shapes are known without running it."""
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.heddle, name).default, CASES[name](), test_utils=checks)


def test_every_operation_is_checked() -> None:
    assert {operations, tree_accept}
    mine = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("heddle::")}
    assert {name.partition(".")[0] for name in mine} == set(CASES)
