"""Every operation of the specification against autograd, torch or transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kernels import ops, reference
from tests.helpers import assert_matches, randn

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
EPS = 1e-5


def gradients(function: Callable[..., Tensor], doutput: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The oracle: autograd's gradients of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, doutput, materialize_grads=True)


def rotary_tables(num_rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 100.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(num_rows, dtype=torch.float64) + 3, frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_llamas_to_the_bit(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(24, EPS).to(dtype)
    norm.weight.data = randn(24, seed=1).to(dtype)
    x = randn(7, 24).to(dtype)
    assert torch.equal(reference.rms_norm(x, norm.weight, EPS), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_backward_equals_autograd(dtype: torch.dtype) -> None:
    x, weight, dy = randn(7, 24, dtype=dtype), randn(24, dtype=dtype, seed=1), randn(7, 24, dtype=dtype, seed=2)
    (expected,) = gradients(lambda x: ops.rms_norm(x, weight, EPS), dy, x)
    assert_matches(ops.rms_norm_backward(dy.to(dtype), x.to(dtype), weight.to(dtype), EPS), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_llamas_to_the_bit_and_fills_the_cache(dtype: torch.dtype) -> None:
    q, k, v = (randn(5, heads, 8, seed=i).to(dtype) for i, heads in enumerate((6, 2, 2)))
    cos, sin = (table.to(dtype) for table in rotary_tables(5, 8))
    k_cache, v_cache = torch.zeros(9, 2, 8, dtype=dtype), torch.zeros(9, 2, 8, dtype=dtype)
    slots = torch.tensor([7, 0, 3, 8, 1])
    expected_q, expected_k = apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
    assert torch.equal(reference.rope_and_cache(q, k, v, cos, sin, k_cache, v_cache, slots), expected_q[0])
    assert torch.equal(k_cache[slots], expected_k[0])
    assert torch.equal(v_cache[slots], v)
    untouched = torch.tensor([2, 4, 5, 6])
    assert not k_cache[untouched].any()
    assert not v_cache[untouched].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_backward_equals_autograd(dtype: torch.dtype) -> None:
    x, dy = randn(5, 6, 8), randn(5, 6, 8, dtype=dtype, seed=1)
    cos, sin = (table.to(dtype).double() for table in rotary_tables(5, 8))
    (expected,) = gradients(lambda x: reference.rope(x, cos, sin), dy, x)
    assert_matches(ops.rope_backward(dy.to(dtype), cos.to(dtype), sin.to(dtype)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_and_its_backward(dtype: torch.dtype) -> None:
    gate_up, dz = randn(7, 2 * 10, dtype=dtype), randn(7, 10, dtype=dtype, seed=1)

    def silu_mul(gate_up: Tensor) -> Tensor:
        return F.silu(gate_up[:, :10]) * gate_up[:, 10:]

    (expected,) = gradients(silu_mul, dz, gate_up)
    assert_matches(ops.silu_mul(gate_up.to(dtype)), silu_mul(gate_up))
    assert_matches(ops.silu_mul_backward(dz.to(dtype), gate_up.to(dtype)), expected)


def causal_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TND, k_TKD, v_TKD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("windows", [(11,), (4, 1, 6), (1,) * 11])
def test_windows_of_attention_backward_sum_to_autograd(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, windows: tuple[int, ...]
) -> None:
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    q, k, v, do = (randn(11, num, 8, dtype=dtype, seed=i) for i, num in enumerate(heads))
    out, expected = causal_attention(q, k, v), gradients(causal_attention, do, q, k, v)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for start, rows in zip(itertools.accumulate((0, *windows)), windows, strict=False):
        window, end = slice(start, start + rows), start + rows
        narrow_do, narrow_q, narrow_k, narrow_v = (x.to(dtype) for x in (do[window], q[window], k[:end], v[:end]))
        o_W, dq_W, dk_L, dv_L = reference.window_attention_backward(narrow_do, narrow_q, narrow_k, narrow_v, start, 0.4)
        assert_matches(o_W, out[window])
        assert_matches(dq_W, expected[0][window])
        dk[:end] += dk_L
        dv[:end] += dv_L
    assert_matches(dk.to(dtype), expected[1])
    assert_matches(dv.to(dtype), expected[2])


def test_window_attention_backward_refuses_keys_of_another_window() -> None:
    q, k = randn(3, 2, 4), randn(5, 2, 4)
    with pytest.raises(ValueError, match="5 keys for a window of 3 rows that starts at 1"):
        reference.window_attention_backward(q, q, k, k, 1, 1.0)


ADAPTER_MIXES = {
    "one for all": [(0, 9, 0)],
    "distinct": [(i, i + 1, i) for i in range(9)],
    "two far apart": [(0, 2, 0), (6, 9, 1)],
    "skewed": [(0, 8, 0), (8, 9, 1)],
    "repeated": [(0, 3, 0), (3, 6, 1), (6, 9, 0)],
    "empty rows": [(4, 4, 0)],
    "none": [],
}


def lora_segments(mix: list[tuple[int, int, int]], dtype: torch.dtype) -> list[ops.LoraSegment]:
    """Adapter i has rank i % 3 + 1, so that neighbours differ in rank."""
    segments = []
    for start, end, i in mix:
        a_RI, b_OR = randn(i % 3 + 1, 5, seed=10 + i).to(dtype), randn(7, i % 3 + 1, seed=50 + i).to(dtype)
        segments.append(ops.LoraSegment(start=start, end=end, a_RI=a_RI, b_OR=b_OR, scale=0.5 + i))
    return segments


def lora_oracle(y: Tensor, x: Tensor, segments: list[ops.LoraSegment], matrices: Sequence[Tensor] | None = None) -> Tensor:
    """Row by row with the product matrix; `matrices` (a, b, a, b, ...) replace the segments' own."""
    rows = list(y)
    for s, segment in enumerate(segments):
        a, b = (segment.a_RI, segment.b_OR) if matrices is None else matrices[2 * s : 2 * s + 2]
        for i in range(segment.start, segment.end):
            rows[i] = rows[i] + segment.scale * (b @ a) @ x[i]
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", ADAPTER_MIXES.values(), ids=ADAPTER_MIXES)
def test_segmented_lora_updates_each_row_by_its_adapter(mix: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    y, x = randn(9, 7, dtype=dtype), randn(9, 5, dtype=dtype, seed=1)
    actual = y.to(dtype).clone()
    ops.segmented_lora(actual, x.to(dtype), lora_segments(mix, torch.promote_types(dtype, torch.float32)))
    assert_matches(actual, lora_oracle(y, x, lora_segments(mix, torch.float64)))


def test_segmented_lora_rounds_half_precision_once() -> None:
    y, x = randn(9, 7).bfloat16(), randn(9, 5, seed=1).bfloat16()
    (segment,) = segments = lora_segments([(0, 9, 0)], torch.float32)
    expected = y.float() + segment.scale * ((x.float() @ segment.a_RI.mT) @ segment.b_OR.mT)
    ops.segmented_lora(y, x, segments)
    assert torch.equal(y, expected.bfloat16())


@pytest.mark.parametrize("mix", ADAPTER_MIXES.values(), ids=ADAPTER_MIXES)
def test_segmented_lora_backward_equals_autograd(mix: list[tuple[int, int, int]]) -> None:
    x, dy = randn(9, 5), randn(9, 7, seed=1)
    segments = lora_segments(mix, torch.float64)
    matrices = [matrix for segment in segments for matrix in (segment.a_RI, segment.b_OR)]
    # x enters with factor zero as well, so that it has a gradient without any segment
    expected = gradients(lambda x, *ab: lora_oracle(0 * x @ x.T @ dy, x, segments, ab), dy, x, *matrices)
    dx = torch.ones_like(x)
    reference.segmented_lora_backward(dx, dy, segments)
    assert_matches(dx - 1, expected[0])
    grads = [(torch.ones_like(segment.a_RI), torch.ones_like(segment.b_OR)) for segment in segments]
    reference.segmented_lora_weight_backward(grads, dy, x, segments)
    for actual, wanted in zip(itertools.chain.from_iterable(grads), expected[1:], strict=True):
        assert_matches(actual - 1, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 4, 128])
def test_linear_cross_entropy_equals_autograd(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LOGIT_ROWS", chunk)
    hidden, head = randn(9, 6, dtype=dtype), randn(31, 6, dtype=dtype, seed=1)
    weights = torch.tensor([0.0, 0.5, 1.0, 0.0, 2.0, -0.25, 0.1, 0.1, 0.0], dtype=torch.float64)
    logits = hidden @ head.mT
    labels = torch.tensor([30, 0, 5, 7, 0, 12, 3, 4, 1])
    labels[4] = logits[4].argmax()

    def weighted_losses(hidden: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ head.mT, labels, reduction="none") * weights

    (dhidden,) = gradients(weighted_losses, torch.ones(9, dtype=torch.float64), hidden)
    losses, hits, actual = ops.linear_cross_entropy(hidden.to(dtype), ops.Linear(head.to(dtype)), labels, weights)
    alone = ops.token_losses(hidden.to(dtype), ops.Linear(head.to(dtype)), labels, weights)
    assert torch.equal(alone[0], losses)
    assert torch.equal(alone[1], hits)
    assert_matches(losses.to(dtype), weighted_losses(hidden))
    assert_matches(actual, dhidden)
    assert torch.equal(hits, (logits.argmax(-1) == labels) & (weights != 0))
    assert hits.any()
    assert not actual[weights == 0].any()


def test_linear_cross_entropy_of_masked_rows_is_zero_whatever_they_hold() -> None:
    hidden = torch.full((3, 6), float("nan"))
    results = ops.linear_cross_entropy(hidden, ops.Linear(randn(31, 6).float()), torch.zeros(3).long(), torch.zeros(3))
    for losses_hits_or_gradient in results:
        assert not losses_hits_or_gradient.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_commit_kv_moves_overlapping_rows_of_every_layer_exactly(dtype: torch.dtype) -> None:
    before = randn(2, 2, 10, 3, 4).to(dtype)
    k_caches, v_caches = list(before[0].clone()), list(before[1].clone())
    src, dst = torch.tensor([3, 5, 4, 9]), torch.tensor([2, 3, 4, 5])
    ops.commit_kv(k_caches, v_caches, src, dst)
    expected = before.clone()
    expected[:, :, dst] = before[:, :, src]
    assert torch.equal(torch.stack(k_caches), expected[0])
    assert torch.equal(torch.stack(v_caches), expected[1])


def test_commit_kv_refuses_lists_that_differ() -> None:
    with pytest.raises(ValueError, match="differ"):
        ops.commit_kv([], [], torch.tensor([1]), torch.tensor([1, 2]))


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clip_grad_norm_equals_torch(max_norm: float) -> None:
    grads = [randn(3, 4, seed=1), randn(5, seed=2)]
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    assert_matches(ops.clip_grad_norm(grads, max_norm), expected)
    for grad, parameter in zip(grads, parameters, strict=True):
        assert parameter.grad is not None
        assert_matches(grad, parameter.grad)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch_over_five_steps(weight_decay: float) -> None:
    expected = [torch.nn.Parameter(randn(3, 4, seed=1)), torch.nn.Parameter(randn(5, seed=2))]
    optimizer = torch.optim.AdamW(expected, lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    actual = [parameter.detach().clone() for parameter in expected]
    exp_avg, exp_avg_sq = ([torch.zeros_like(parameter) for parameter in actual] for _ in range(2))
    for step in range(1, 6):
        grads = [randn(*parameter.shape, seed=10 * step + i) for i, parameter in enumerate(expected)]
        for parameter, grad in zip(expected, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        ops.adamw(
            actual,
            grads,
            exp_avg,
            exp_avg_sq,
            step=step,
            learning_rate=0.05,
            beta1=0.8,
            beta2=0.95,
            eps=1e-6,
            weight_decay=weight_decay,
        )
        for mine, theirs in zip(actual, expected, strict=True):
            assert_matches(mine, theirs.detach())
