"""The row-wise Triton kernels against the reference in fp64: norms, activations, RoPE with its cache writes."""

from __future__ import annotations

import pytest
import torch

import tests.triton_stage as stage
from kernels import reference
from kernels.dropout import drop as reference_drop
from kernels.dropout import drop_keys
from kernels.triton_ops.drop import drop
from kernels.triton_ops.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from kernels.triton_ops.rope_and_cache import rope_and_cache, rope_backward
from kernels.triton_ops.silu_mul import silu_mul, silu_mul_backward
from tests.helpers import assert_matches, randn

EPS = 1e-5
SHAPES = [(0, 24), (1, 24), (3, 64), (5, 100)]


@pytest.mark.parametrize("dtype", stage.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_and_its_backward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, dy = randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)
    narrow_x, narrow_weight, narrow_dy = (stage.put(tensor, dtype) for tensor in (x, weight, dy))
    assert_matches(rms_norm(narrow_x, narrow_weight, EPS).cpu(), reference.rms_norm(x, weight, EPS))
    dx = rms_norm_backward(narrow_dy, narrow_x, narrow_weight, EPS)
    assert_matches(dx.cpu(), reference.rms_norm_backward(dy, x, weight, EPS))


def test_rms_norm_rounds_where_the_reference_does() -> None:
    x, weight = stage.put(randn(4, 48), torch.float16), stage.put(randn(48, seed=1), torch.float16)
    assert torch.equal(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


def test_rows_may_be_slices_of_wider_ones() -> None:
    wide, weight = randn(5, 80, dtype=torch.float32), randn(24, dtype=torch.float32, seed=1)
    part = stage.put(wide, torch.float32)[:, 8:32]
    actual = rms_norm(part, stage.put(weight, torch.float32), EPS)
    assert_matches(actual.cpu(), reference.rms_norm(wide[:, 8:32], weight, EPS))


@pytest.mark.parametrize("dtype", stage.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1), randn(shape[1], dtype=dtype, seed=2)
    m, y = add_rms_norm(*(stage.put(tensor, dtype) for tensor in (x, residual, weight)), EPS)
    expected_m, expected_y = reference.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(m.cpu(), expected_m.to(dtype))
    assert_matches(y.cpu(), expected_y)


@pytest.mark.parametrize("dtype", stage.DTYPES)
@pytest.mark.parametrize("shape", [(0, 10), (1, 10), (3, 64), (2, 1030)], ids=str)
def test_silu_mul_and_its_backward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up, dz = randn(shape[0], 2 * shape[1], dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    narrow = stage.put(gate_up, dtype)
    assert_matches(silu_mul(narrow).cpu(), reference.silu_mul(gate_up))
    assert_matches(silu_mul_backward(stage.put(dz, dtype), narrow).cpu(), reference.silu_mul_backward(dz, gate_up))


@pytest.mark.parametrize("dtype", stage.DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 8), (9, 3, 24), (8, 8, 16), (16, 1, 4)])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_rope_and_cache(num_heads: int, num_kv_heads: int, head_dim: int, num_rows: int, dtype: torch.dtype) -> None:
    heads = num_heads + 2 * num_kv_heads
    fused = randn(num_rows, heads * head_dim, dtype=dtype)
    cos, sin = (randn(num_rows, head_dim, dtype=dtype, seed=seed) / 2 for seed in (1, 2))
    slots = torch.tensor([7, 0, -1, 8, 1])[:num_rows]
    expected_k, expected_v = torch.zeros(2, 9, num_kv_heads, head_dim, dtype=torch.float64)
    widths = [num_heads, num_kv_heads, num_kv_heads]
    q, k, v = torch.split(fused.view(num_rows, heads, head_dim), widths, dim=1)
    expected = reference.rope_and_cache(q, k, v, cos, sin, expected_k, expected_v, slots)
    narrow = torch.split(stage.put(fused, dtype).view(num_rows, heads, head_dim), widths, dim=1)
    tables = (stage.put(cos, dtype), stage.put(sin, dtype))
    k_cache, v_cache = (stage.put(torch.zeros(9, num_kv_heads, head_dim), dtype) for _ in range(2))
    out = rope_and_cache(*narrow, *tables, k_cache, v_cache, slots.to(stage.DEVICE))
    assert_matches(out.cpu(), expected)
    assert_matches(k_cache.cpu(), expected_k)
    assert torch.equal(v_cache.cpu().double(), expected_v)


@pytest.mark.parametrize("dtype", stage.DTYPES)
@pytest.mark.parametrize(("num_heads", "head_dim"), [(6, 8), (9, 24), (1, 4)])
def test_rope_backward(num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    dx = randn(5, num_heads, head_dim, dtype=dtype)
    cos, sin = (randn(5, head_dim, dtype=dtype, seed=seed) / 2 for seed in (1, 2))
    actual = rope_backward(*(stage.put(x, dtype) for x in (dx, cos, sin)))
    assert_matches(actual.cpu(), reference.rope_backward(dx, cos, sin))


@pytest.mark.parametrize("salt", [0, 3, 127])
def test_dropout_drops_what_the_specification_drops(salt: int) -> None:
    x = randn(7, 1030, dtype=torch.float32).float()
    keys = drop_keys(2**31 + 5, torch.arange(7))
    rates = torch.tensor([0.0, 0.1, 0.5, 0.05, 0.9, 0.0, 0.3], dtype=torch.float64)
    actual = drop(*(tensor.to(stage.DEVICE) for tensor in (x, keys, rates)), salt)
    assert torch.equal(actual.cpu(), reference_drop(x, keys, rates, salt))


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = stage.put(randn(3, 5), torch.float32)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, x[0, :4].contiguous(), EPS)
    with pytest.raises(ValueError, match="5 columns"):
        silu_mul(x)
    with pytest.raises(ValueError, match="gradient"):
        silu_mul_backward(x, x)
