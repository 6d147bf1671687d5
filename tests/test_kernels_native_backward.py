"""The compiled gradients: against the specification in a wider type, and the same bits however rows are divided among calls."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from torch import Tensor

from kernels import ops, reference
from kernels.native import backward as native
from kernels.native import build as native_build
from kernels.native.operations import PackedLinear
from tests.helpers import assert_matches, randn
from tests.test_kernels_attention import make_segments

DTYPES = [torch.float32, torch.bfloat16]
NUM_SLOTS, SCALE = 512, 0.3

pytestmark = pytest.mark.skipif(native_build.library() is None, reason="no compiler, or no AVX2")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_in", "num_out"), [(24, 40), (7, 3), (33, 2500), (64, 530), (345, 16)])
def test_linear_backward(num_in: int, num_out: int, dtype: torch.dtype) -> None:
    weight, dy = (randn(num_out, num_in, dtype=dtype) / num_out**0.5).to(dtype), randn(300, num_out + 5, dtype=dtype, seed=1)
    dy = dy.to(dtype)[:, 2 : num_out + 2]
    linear = PackedLinear(weight)
    assert torch.equal(linear.weight(), weight)
    whole = linear.backward(dy)
    assert_matches(whole, dy.double() @ weight.double())
    for start, end in [(0, 1), (5, 12), (3, 251)]:
        assert torch.equal(linear.backward(dy[start:end]), whole[start:end])
    with pytest.raises(ValueError, match=f"{num_out} outputs"):
        linear.backward(dy[:, 1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype: torch.dtype) -> None:
    dy, x, weight = randn(70, 576, dtype=dtype), randn(70, 576, dtype=dtype, seed=1), randn(576, dtype=dtype, seed=2)
    found = ops.rms_norm_backward(dy.to(dtype), x.to(dtype), weight.to(dtype), 1e-5)
    assert_matches(found, reference.rms_norm_backward(dy, x, weight, 1e-5))
    gate_up = 4 * randn(70, 96, dtype=dtype, seed=3)
    found = ops.silu_mul_backward(dy[:, :48].to(dtype), gate_up.to(dtype))
    assert_matches(found, reference.silu_mul_backward(dy[:, :48], gate_up))


def test_silu_of_extreme_gates() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.5, -87.5, 0.0, 88.5, 1e30, torch.nan]).repeat(2, 1)
    found = ops.silu_mul_backward(torch.ones_like(gate), torch.cat([gate, torch.ones_like(gate)], dim=1))
    wide = torch.cat([gate, torch.ones_like(gate)], dim=1).double()
    expected = reference.silu_mul_backward(torch.ones_like(gate).double(), wide)
    torch.testing.assert_close(found.double(), expected, atol=1e-30, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("num_words", [3, 61, 3000])
def test_entropies(num_words: int) -> None:
    logits, labels = 5 * randn(40, num_words), torch.arange(40) % num_words
    logits[1, labels[1]], logits[2, 0], logits[3] = 60.0, -torch.inf, 1.0
    logits[4, num_words - 1] = torch.nan
    found, wide = logits.float().clone(), logits.float().double()
    losses, hits = native.entropies(found, labels, True)
    expected, are_hits = reference.entropies(wide, labels, True)
    sound = torch.arange(40) != 4
    torch.testing.assert_close(losses[sound].double(), expected[sound], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[sound].double(), wide[sound], rtol=1e-5, atol=1e-7)
    assert torch.equal(hits[sound], are_hits[sound])
    assert losses[4].isnan()
    assert found[4].isnan().any()
    again = logits.float()
    assert torch.equal(native.entropies(again[7:9], labels[7:9], False)[0], losses[7:9])
    assert torch.equal(again[7:9], logits.float()[7:9])


def lora_segments(ranks: list[int], spans: list[tuple[int, int]]) -> list[ops.LoraSegment]:
    """Two targets each, beside an untouched column."""
    return [
        ops.LoraSegment(
            start=start, end=end, a_RI=randn(rank, 24, seed=rank + column) / 5,
            b_OR=randn(11, rank, seed=rank + 2 * column) / 5, scale=0.5 + rank / 10, column=column,
        )
        for rank, (start, end) in zip(ranks, spans, strict=True)
        for column in (1, 12)
    ]  # fmt: skip


def as_float(segment: ops.LoraSegment) -> ops.LoraSegment:
    return dataclasses.replace(segment, a_RI=segment.a_RI.float(), b_OR=segment.b_OR.float())


def test_adapters() -> None:
    segments = lora_segments([3, 1, 17, 3], [(0, 40), (45, 46), (46, 90), (90, 97)])
    dy, x, dx = randn(100, 25), randn(100, 24, seed=1), randn(100, 24, seed=2)
    found_dx, expected_dx = dx.float(), dx.clone()
    expected = [(randn(*s.a_RI.shape, seed=i), randn(*s.b_OR.shape, seed=i)) for i, s in enumerate(segments)]
    found = [(da.float(), db.float()) for da, db in expected]
    plan = ops.LoraPlan([as_float(s) for s in segments])
    ops.segmented_lora_gradients(found_dx, dy.float(), x.float(), found, plan)
    reference.segmented_lora_backward(expected_dx, dy, segments)
    reference.segmented_lora_weight_backward(expected, dy, x, segments)
    assert_matches(found_dx, expected_dx)
    for pair, wanted in zip(found, expected, strict=True):
        for tensor, other in zip(pair, wanted, strict=True):
            assert_matches(tensor, other)


def test_an_adapters_rows_may_be_divided_anywhere_in_their_order() -> None:
    (one, two), draw = lora_segments([5], [(0, 90)]), random.Random(0)
    dy, x = randn(90, 25).float(), randn(90, 24, seed=1).float()

    def gradients(cuts: list[int]) -> list[tuple[Tensor, Tensor]]:
        grads = [(torch.zeros(5, 24), torch.zeros(11, 5)) for _ in range(2)]
        for end, start in itertools.pairwise(cuts):
            segments = [as_float(dataclasses.replace(s, start=0, end=end - start)) for s in (one, two)]
            plan = ops.LoraPlan(segments, order_T=torch.arange(end - start - 1, -1, -1))
            ops.segmented_lora_gradients(None, dy[start:end], x[start:end], grads, plan)
        return grads

    whole = gradients([90, 0])
    for _ in range(5):
        cut = gradients([90, *sorted(draw.sample(range(1, 90), draw.randint(1, 9)), reverse=True), 0])
        assert all(torch.equal(a, b) for pair, other in zip(whole, cut, strict=True) for a, b in zip(pair, other, strict=True))


@pytest.mark.parametrize(("head_dim", "heads"), [*itertools.product([8, 64], [(6, 2), (4, 4), (3, 1)]), (24, (50, 1))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype: torch.dtype, head_dim: int, heads: tuple[int, int]) -> None:
    segments, num_rows = make_segments([(0, 5), (31, 2), (3, 50), (17, 17), (64, 1), (0, 33)], 0)
    shapes = ((num_rows, heads[0]), (num_rows, heads[0]), (NUM_SLOTS, heads[1]), (NUM_SLOTS, heads[1]))
    do, q, k, v = (randn(*shape, head_dim, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    unread = torch.ones(NUM_SLOTS, dtype=torch.bool)
    for segment in segments:
        unread[segment.slots_L] = False
    k_cache, v_cache = (tensor.to(dtype).masked_fill(unread[:, None, None], torch.nan) for tensor in (k, v))
    sizes = [segment.slots_L.numel() for segment in segments]
    places = [(torch.ones(n, heads[1], head_dim), torch.full((n, heads[1], head_dim), 2.0)) for n in sizes]
    plan = ops.AttentionPlan(segments)
    found = ops.add_attention_gradients(do.to(dtype), q.to(dtype), k_cache, v_cache, plan, SCALE, places)
    out, dq, dk, dv = reference.ragged_attention_backward(do, q, k, v, segments, SCALE)
    for tensor, wanted in zip(found, (out, dq), strict=True):
        assert_matches(tensor.to(dtype), wanted)
    for (own_k, own_v), wanted_k, wanted_v in zip(places, torch.split(dk, sizes), torch.split(dv, sizes), strict=True):
        assert_matches(own_k - 1.0, wanted_k)
        assert_matches(own_v - 2.0, wanted_v)


def test_a_sequences_windows_may_be_cut_anywhere_and_go_beside_others() -> None:
    draw, num_rows = random.Random(1), 75
    do, q, k, v = (randn(num_rows, n, 16, seed=i).float() for i, n in enumerate((4, 4, 2, 2)))
    slots = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))

    def gradients(cuts: list[int], num_others: int) -> list[Tensor]:
        outs, dk, dv = [], torch.zeros(num_rows, 2, 16), torch.zeros(num_rows, 2, 16)
        for end, start in itertools.pairwise(cuts):
            own = ops.AttentionSegment(start=num_others, end=num_others + end - start, slots_L=slots[:end])
            others = [ops.AttentionSegment(start=i, end=i + 1, slots_L=slots[: 3 * i + 1]) for i in range(num_others)]
            places = [(torch.zeros(3 * i + 1, 2, 16), torch.zeros(3 * i + 1, 2, 16)) for i in range(num_others)]
            do_rows, q_rows = (torch.cat([part[:num_others], part[start:end]]) for part in (do, q))
            plan, places = ops.AttentionPlan([*others, own]), [*places, (dk[:end], dv[:end])]
            results = ops.add_attention_gradients(do_rows, q_rows, k, v, plan, SCALE, places)
            outs.append(torch.stack(results)[:, num_others:])
        return [torch.cat(outs[::-1], dim=1), dk, dv]

    whole = gradients([num_rows, 0], 0)
    for _ in range(5):
        cut = gradients([num_rows, *sorted(draw.sample(range(1, num_rows), 4), reverse=True), 0], draw.randint(0, 5))
        assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
