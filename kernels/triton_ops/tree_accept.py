"""The greedy walk of a batch of draft trees, one program per tree. Knows tokens, not sequences.

For a loop that stays on the device. The executor's own pass reads the drawn tokens once in any case (grammars, stop strings and
penalties are the host's) and walks its trees there, `services.executor.verify.accept`: the two agree, which a test holds.

T nodes of all trees, B trees, M the most nodes of a tree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton_ops.lang import constexpr, jit, next_power_of_2, scalar, tl


@jit
def _tree_accept_kernel(
    tokens_ptr: scalar,
    parents_ptr: scalar,
    drawn_ptr: scalar,
    starts_ptr: scalar,
    path_ptr: scalar,
    emitted_ptr: scalar,
    accepted_ptr: scalar,
    M: scalar,
    BLOCK_M: constexpr,
) -> None:
    """From the root, as long as a child holds the token drawn at the node: descend to the first such child."""
    tree = tl.program_id(0)
    start = tl.load(starts_ptr + tree)
    size = tl.load(starts_ptr + tree + 1) - start
    offs = tl.arange(0, BLOCK_M)
    mask = offs < size
    tokens = tl.load(tokens_ptr + start + offs, mask=mask, other=-1)
    parents = tl.load(parents_ptr + start + offs, mask=mask, other=-2)
    row = tree.to(tl.int64) * M
    token = tl.load(drawn_ptr + start)
    tl.store(emitted_ptr + row, token)
    accepted_len = 0
    child = tl.min(tl.where((parents == 0) & (tokens == token), offs, BLOCK_M), axis=0)
    while child < BLOCK_M:
        tl.store(path_ptr + row + accepted_len, child.to(tl.int64))
        accepted_len += 1
        token = tl.load(drawn_ptr + start + child)
        tl.store(emitted_ptr + row + accepted_len, token)
        child = tl.min(tl.where((parents == child) & (tokens == token), offs, BLOCK_M), axis=0)
    tl.store(accepted_ptr + tree, accepted_len)


@torch.library.custom_op("heddle::tree_accept", mutates_args=())
def tree_accept(
    tokens_T: Tensor, parents_T: Tensor, drawn_T: Tensor, starts: Tensor, max_nodes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes accepted [B, M] (root excluded), tokens emitted [B, M] (the last is the bonus), accepted_len [B]; filled with -1.

    Trees are rows starts[i] .. starts[i + 1] with parents inside their tree, each before its children; none has more than
    `max_nodes` nodes or none at all. drawn[t] is the target's token after node t.
    """
    if tokens_T.shape != parents_T.shape or tokens_T.shape != drawn_T.shape or starts.numel() < 1 or max_nodes < 1:
        raise ValueError(f"tokens {tuple(tokens_T.shape)}, parents {tuple(parents_T.shape)}, drawn {tuple(drawn_T.shape)}")
    for x in (tokens_T, parents_T, drawn_T, starts):
        assert x.is_contiguous()
        assert x.dtype == torch.int64
    num_trees = starts.numel() - 1
    path_BM, emitted_BM = (torch.full((num_trees, max_nodes), -1, device=tokens_T.device) for _ in range(2))
    accepted_B = torch.zeros(num_trees, dtype=torch.int64, device=tokens_T.device)
    if num_trees:
        _tree_accept_kernel[(num_trees,)](
            tokens_T, parents_T, drawn_T, starts, path_BM, emitted_BM, accepted_B, max_nodes,
            BLOCK_M=next_power_of_2(max_nodes), num_warps=1,
        )  # fmt: skip
    return path_BM, emitted_BM, accepted_B


@tree_accept.register_fake
def _(tokens_T: Tensor, parents_T: Tensor, drawn_T: Tensor, starts: Tensor, max_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    num_trees = starts.numel() - 1
    shape = (num_trees, max_nodes)
    return tokens_T.new_empty(shape), tokens_T.new_empty(shape), tokens_T.new_empty(num_trees)
