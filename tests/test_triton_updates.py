"""Triton's cache moves, AdamW, cross entropy and tree walks against the reference, moves and trees to the bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tests.triton_stage as stage
from kernels import reference
from kernels.triton_ops import adamw as adamw_module
from kernels.triton_ops import linear_cross_entropy as loss_module
from kernels.triton_ops.adamw import adamw
from kernels.triton_ops.commit_kv import commit_kv
from kernels.triton_ops.linear_cross_entropy import linear_cross_entropy
from kernels.triton_ops.tree_accept import tree_accept
from services.executor.verify import accept
from tests.helpers import assert_matches, randn


@pytest.mark.parametrize("dtype", stage.DTYPES)
@pytest.mark.parametrize(
    ("src", "dst"),
    [([], []), ([3], [3]), ([3, 5, 4, 9], [2, 3, 4, 5]), ([0, 1, 2], [1, 2, 0]), ([8, 8, 8], [0, 1, 2])],
    ids=["nothing", "itself", "overlap", "cycle", "spread"],
)
def test_commit_kv(src: list[int], dst: list[int], dtype: torch.dtype) -> None:
    before = randn(2, 3, 10, 3, 12, dtype=dtype)
    expected, actual = before.clone(), stage.put(before, dtype)
    source, target = torch.tensor(src, dtype=torch.int64), torch.tensor(dst, dtype=torch.int64)
    reference.commit_kv(list(expected[0]), list(expected[1]), source, target)
    caches = [[layer.clone() for layer in side] for side in actual]
    commit_kv(caches[0], caches[1], source.to(stage.DEVICE), target.to(stage.DEVICE))
    assert torch.equal(torch.stack([torch.stack(side) for side in caches]).cpu().double(), expected)


def test_commit_kv_refuses_what_differs() -> None:
    narrow, wide = torch.zeros(4, 2, 8, device=stage.DEVICE), torch.zeros(4, 4, 8, device=stage.DEVICE)
    one, two = torch.tensor([1], device=stage.DEVICE), torch.tensor([1, 2], device=stage.DEVICE)
    with pytest.raises(ValueError, match="differ"):
        commit_kv([narrow], [narrow], one, two)
    with pytest.raises(ValueError, match="different sizes"):
        commit_kv([narrow], [wide], one, one)
    with pytest.raises(ValueError, match="beside"):
        commit_kv([narrow], [narrow.half()], one, one)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_over_five_steps(weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_module, "BLOCK", 16)
    shapes = [(3, 4), (5,), (0,), (16,), (33,)]
    expected = [randn(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)]
    actual = [stage.put(x, torch.float32) for x in expected]
    moments = [[torch.zeros_like(x) for x in tensors] for tensors in (expected, expected, actual, actual)]
    options: dict[str, Any] = {"learning_rate": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": weight_decay}
    for step in range(1, 6):
        grads = [randn(*shape, dtype=torch.float32, seed=10 * step + i) for i, shape in enumerate(shapes)]
        reference.adamw(expected, grads, *moments[:2], step=step, **options)
        adamw(actual, [stage.put(x, torch.float32) for x in grads], *moments[2:], step=step, **options)
    for wanted, found in zip([*expected, *moments[0], *moments[1]], [*actual, *moments[2], *moments[3]], strict=True):
        assert_matches(found.cpu(), wanted)


def test_adamw_refuses_lists_that_differ() -> None:
    x, half = torch.zeros(4, device=stage.DEVICE), torch.zeros(4, device=stage.DEVICE).half()
    options: dict[str, Any] = {"learning_rate": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="size"):
        adamw([x], [x[:3]], [x], [x], step=1, **options)
    with pytest.raises(ValueError, match="type"):
        adamw([x], [half], [x], [x], step=1, **options)


@pytest.mark.parametrize("dtype", stage.DTYPES)
@pytest.mark.parametrize(("chunk", "block"), [(4, 16), (128, 4096)])
def test_linear_cross_entropy(dtype: torch.dtype, chunk: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGIT_ROWS", chunk)
    monkeypatch.setattr(loss_module, "MAX_BLOCK", block)
    hidden, head = randn(9, 6, dtype=dtype) / 2, randn(51, 6, dtype=dtype, seed=1) / 2
    hidden, head = hidden.to(dtype).double(), head.to(dtype).double()
    weights = torch.tensor([0.0, 0.5, 1.0, 0.0, 2.0, -0.25, 0.125, 0.125, 0.0], dtype=torch.float64)
    labels = torch.tensor([30, 0, 5, 7, 0, 12, 3, 50, 1])
    labels[4] = (hidden @ head.mT)[4].argmax()
    losses, hits, dhidden = reference.linear_cross_entropy(hidden, head, labels, weights)
    narrow = (stage.put(hidden, dtype), stage.put(head, dtype), labels.to(stage.DEVICE), weights.to(stage.DEVICE))
    products = (lambda x: x @ narrow[1].mT), (lambda dy: dy @ narrow[1])
    actual_losses, actual_hits, actual_dhidden = linear_cross_entropy(narrow[0], *products, *narrow[2:])
    again, hits_again, none = linear_cross_entropy(narrow[0], products[0], None, *narrow[2:])
    assert torch.equal(again, actual_losses)
    assert torch.equal(hits_again, actual_hits)
    assert not none.any()
    assert_matches(actual_losses.to(dtype).cpu(), losses)
    assert torch.equal(actual_hits.cpu(), hits)
    assert hits.any()
    assert_matches(actual_dhidden.cpu(), dhidden)


def test_linear_cross_entropy_counts_the_first_of_equal_logits_and_skips_masked_rows() -> None:
    hidden, head = torch.ones(3, 4, device=stage.DEVICE), torch.ones(40, 4, device=stage.DEVICE)
    hidden[2] = torch.nan
    labels = torch.tensor([0, 1, 0], device=stage.DEVICE)
    losses, hits, dhidden = linear_cross_entropy(
        hidden, lambda x: x @ head.mT, lambda dy: dy @ head, labels, torch.tensor([1.0, 1.0, 0.0])
    )
    assert hits.tolist() == [True, False, False]
    assert_matches(losses.sum().cpu(), 2 * F.cross_entropy(torch.ones(1, 40), torch.tensor([0])))
    assert not dhidden[2].any()


TREES = {
    "root alone": [-1],
    "chain": [-1, 0, 1, 2, 3],
    "star": [-1, 0, 0, 0, 0, 0],
    "binary": [-1, 0, 0, 1, 1, 2, 2],
    "ragged": [-1, 0, 0, 1, 3, 3, 2],
}


@pytest.mark.parametrize("names", [["root alone"], ["chain"], ["star"], ["binary"], list(TREES), list(TREES) * 4, []], ids=str)
def test_tree_accept_walks_as_the_executor_does(names: list[str]) -> None:
    rng = random.Random(len(names))
    trees = [TREES[name] for name in names]
    tokens = [[rng.randrange(3) for _ in parents] for parents in trees]
    drawn = [[rng.randrange(3) for _ in parents] for parents in trees]
    flat = [torch.tensor([x for tree in part for x in tree], dtype=torch.int64) for part in (tokens, trees, drawn)]
    starts = torch.tensor([0, *(len(tree) for tree in trees)]).cumsum(0)
    path, emitted, accepted_len = (x.cpu() for x in tree_accept(*(x.to(stage.DEVICE) for x in (*flat, starts)), 7))
    for i, parents in enumerate(trees):
        verdict = accept(tokens[i], parents, drawn[i])
        assert int(accepted_len[i]) == len(verdict.path)
        assert path[i].tolist() == [*verdict.path, *[-1] * (7 - len(verdict.path))]
        assert emitted[i].tolist() == [*verdict.tokens, *[-1] * (7 - len(verdict.tokens))]
    assert len(accepted_len) == len(trees)


def test_tree_accept_descends_to_the_end() -> None:
    parents, tokens = torch.tensor([-1, 0, 1, 2]), torch.tensor([9, 5, 6, 7])
    inputs = [x.to(stage.DEVICE) for x in (tokens, parents, torch.tensor([5, 6, 7, 8]), torch.tensor([0, 4]))]
    path, emitted, accepted_len = tree_accept(*inputs, 4)
    assert (path.tolist(), emitted.tolist(), accepted_len.tolist()) == ([[1, 2, 3, -1]], [[5, 6, 7, 8]], [3])
