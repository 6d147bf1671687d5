"""The compiled CPU operations: against the specification, the same bits whatever shares a call, machines without them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import ops, reference
from kernels.native import build as native_build
from kernels.native import memory
from kernels.native import operations as native
from tests.helpers import assert_matches, randn

DTYPES = [torch.float32, torch.bfloat16]
NUM_SLOTS = 1024

pytestmark = pytest.mark.skipif(native_build.library() is None, reason="no compiler, or no AVX2")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), [(24, 40), (7, 3), (64, 16), (33, 65)])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 48, 49, 100])
def test_linear_and_its_transpose(num_rows: int, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    weight, bias = randn(num_out, num_in, dtype=dtype) / num_in**0.5, randn(num_out, dtype=dtype, seed=1)
    x, dy = randn(num_rows, num_in, dtype=dtype, seed=2), randn(num_rows, num_out, dtype=dtype, seed=3)
    narrow = weight.to(dtype)
    linear = native.PackedLinear(narrow, bias.to(dtype))
    assert_matches(linear(x.to(dtype)), x @ narrow.double().T + bias)
    transposed = native.PackedLinear(narrow, transposed=True)
    assert_matches(transposed(dy.to(dtype)), dy @ narrow.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [33, 600, 1025])
def test_linear_in_parts(num_rows: int, dtype: torch.dtype) -> None:
    """More rows and inputs than stay in a cache at once."""
    weight, x = randn(72, 1400, dtype=dtype) / 1400**0.5, randn(num_rows, 1400, dtype=dtype, seed=1)
    narrow = weight.to(dtype)
    linear, transposed = native.PackedLinear(narrow), native.PackedLinear(narrow.T, transposed=True)
    assert_matches(linear(x.to(dtype)), x @ narrow.double().T)
    assert torch.equal(transposed(x.to(dtype)), linear(x.to(dtype)))
    dy = randn(num_rows, 72, dtype=dtype, seed=2)
    assert_matches(linear.backward(dy.to(dtype)), dy @ narrow.double())
    wide = native.PackedLinear(narrow.T.contiguous())
    assert_matches(wide.backward(x.to(dtype)), x @ narrow.double().T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_takes_rows_that_are_not_contiguous_and_refuses_other_shapes(dtype: torch.dtype) -> None:
    weight, wide = randn(20, 12, dtype=dtype).to(dtype), randn(5, 40, dtype=dtype, seed=1).to(dtype)
    linear = native.PackedLinear(weight)
    assert torch.equal(linear(wide[:, 8:20]), linear(wide[:, 8:20].contiguous()))
    assert torch.equal(linear(wide[:, ::2][:, :12]), linear(wide[:, ::2][:, :12].contiguous()))
    with pytest.raises(ValueError, match="12 inputs"):
        linear(wide)
    with pytest.raises(ValueError, match="float64"):
        linear(wide[:, :12].double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 100])
def test_rows(num_rows: int, dtype: torch.dtype) -> None:
    x, residual = randn(num_rows, 576, dtype=dtype), randn(num_rows, 576, dtype=dtype, seed=1)
    weight = randn(576, dtype=dtype, seed=2)
    assert_matches(native.rms_norm(x.to(dtype), weight.to(dtype), 1e-5), reference.rms_norm(x, weight, 1e-5))
    m, y = native.add_rms_norm(x.to(dtype), residual.to(dtype), weight.to(dtype), 1e-5)
    assert torch.equal(m, x.to(dtype) + residual.to(dtype))
    assert_matches(y, reference.rms_norm(m.double(), weight, 1e-5))
    gate_up = 4 * randn(num_rows, 96, dtype=dtype, seed=3)
    assert_matches(native.silu_mul(gate_up.to(dtype)), reference.silu_mul(gate_up))


def test_silu_of_extreme_gates() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.5, -87.5, 0.0, 88.5, 1e30, torch.nan]).repeat(2, 1)
    out = native.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
    expected = reference.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
    torch.testing.assert_close(out, expected, atol=1e-30, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (2, 1, 128)])
def test_rope_and_cache(num_heads: int, num_kv_heads: int, head_dim: int, num_rows: int, dtype: torch.dtype) -> None:
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = randn(num_rows, width, dtype=dtype)
    cos, sin = randn(num_rows, head_dim, dtype=dtype, seed=1), randn(num_rows, head_dim, dtype=dtype, seed=2)
    slots = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(0))[:num_rows]
    found, expected = (
        [torch.zeros(NUM_SLOTS, num_kv_heads, head_dim).to(kind) for _ in "kv"] for kind in (dtype, torch.float64)
    )
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    results = []
    for values, c, s, caches, chosen in (
        (qkv.to(dtype), cos.to(dtype), sin.to(dtype), found, native),
        (qkv, cos, sin, expected, reference),
    ):
        q, k, v = (part.view(num_rows, -1, head_dim) for part in values.split_with_sizes(sizes, dim=1))
        results.append(chosen.rope_and_cache(q, k, v, c, s, *caches, slots))
    assert_matches(results[0], results[1])
    for cache, oracle in zip(found, expected, strict=True):
        assert_matches(cache, oracle)


# --- the same bits, whatever shares the call -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_linear_is_the_same_in_any_batch_and_with_any_number_of_threads(dtype: torch.dtype) -> None:
    linear = native.PackedLinear(randn(96, 70, dtype=dtype).to(dtype), randn(96, dtype=dtype, seed=1).to(dtype))
    x = randn(60, 70, dtype=dtype, seed=2).to(dtype)
    alone = torch.cat([linear(x[i : i + 1]) for i in range(60)])
    for size in (2, 3, 4, 5, 6, 7, 13, 48, 60):
        assert torch.equal(torch.cat([linear(part) for part in x.chunk(-(-60 // size))]), alone)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(linear(x), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), [(24, 16), (33, 43), (64, 100)])
@pytest.mark.parametrize("rank", [3, 8, 16, 21, 130])
def test_a_row_of_an_adapters_update_is_the_same_alone_and_among_many(
    rank: int, num_in: int, num_out: int, dtype: torch.dtype
) -> None:
    x, y = randn(150, num_in, dtype=dtype).to(dtype), randn(150, num_out + 2, dtype=dtype, seed=1).to(dtype)
    a, b = randn(rank, num_in, seed=2).float() / num_in**0.5, randn(num_out, rank, seed=3).float() / rank**0.5

    def updated(start: int, end: int) -> Tensor:
        out = y[start:end].clone()
        segment = ops.LoraSegment(start=0, end=end - start, a_RI=a, b_OR=b, scale=0.7, column=1)
        ops.segmented_lora(out, x[start:end], ops.LoraPlan([segment]))
        return out

    whole = updated(0, 150)
    for cut in (1, 7, 9, 40):
        assert torch.equal(torch.cat([updated(i, min(i + cut, 150)) for i in range(0, 150, cut)]), whole)
    expected = y.double()
    expected[:, 1:-1] += 0.7 * (x.double() @ a.double().T) @ b.double().T
    assert_matches(whole, expected)


def chain_and_tree(dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    num_heads, num_kv_heads = heads
    k, v = (randn(NUM_SLOTS, num_kv_heads, head_dim, dtype=dtype, seed=seed).to(dtype) for seed in (1, 2))
    slots = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(3)).tolist()
    return randn(90, num_heads, head_dim, dtype=dtype).to(dtype), k, v, slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("heads", "head_dim"), [((9, 3), 64), ((4, 1), 16)])
def test_a_row_of_attention_is_the_same_alone_in_a_chunk_in_a_batch_and_in_a_tree(
    heads: tuple[int, int], head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    """Row i of a sequence of 90: as one prefill, token by token, in chunks beside others, and as a path of a wide tree."""
    q, k, v, slots = chain_and_tree(dtype, heads, head_dim)
    scale = head_dim**-0.5

    def attend(rows: Tensor, segments: list[ops.AttentionSegment]) -> Tensor:
        return native.ragged_attention(rows, k, v, ops.AttentionPlan(segments), scale, window)

    def run(start: int, end: int, at: int = 0) -> ops.AttentionSegment:
        return ops.AttentionSegment(start=at, end=at + end - start, slots_L=torch.tensor(slots[:end]))

    whole = attend(q, [run(0, 90)])
    singles = torch.cat([attend(q[i : i + 1], [run(i, i + 1)]) for i in range(90)])
    assert torch.equal(whole, singles)
    chunks = [run(0, 7), run(7, 40, at=7), run(40, 41, at=40), run(41, 90, at=41)]
    assert torch.equal(attend(q, chunks), whole)
    # A tree behind 80 tokens: rows 80..84 of the sequence are nodes 0, 2, 5, 9, 12; the others are siblings with other keys.
    path, parents = [0, 2, 5, 9, 12], [-1, 0, 0, 1, 1, 2, 2, 3, 5, 5, 8, 8, 9]
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents[1:], start=1):
        mask[node] |= mask[parent]
    spare = iter(slots[200:])
    own = [slots[80 + path.index(node)] if node in path else next(spare) for node in range(len(parents))]
    rows = torch.stack([q[80 + path.index(node)] if node in path else q[0] for node in range(len(parents))])
    tree = ops.AttentionSegment(start=0, end=len(parents), slots_L=torch.tensor(slots[:80] + own), mask_nn=mask)
    assert torch.equal(attend(rows, [tree])[path], whole[80:85])


def test_nan_in_a_sequence_stays_in_it() -> None:
    q, k, v, slots = chain_and_tree(torch.float32, (4, 2), 16)
    k[slots[10]] = torch.nan
    segments = [
        ops.AttentionSegment(start=0, end=1, slots_L=torch.tensor(slots[5:20])),
        ops.AttentionSegment(start=1, end=3, slots_L=torch.tensor(slots[20:50])),
    ]
    out = native.ragged_attention(q[:3], k, v, ops.AttentionPlan(segments), 0.25)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()


# --- machines without it -------------------------------------------------------------------------------------------------


def test_without_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEDDLE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native_build, "compiler", lambda: None)
    native_build.loaded.cache_clear()
    try:
        assert native_build.library() is None
        x, weight = randn(3, 16).float(), randn(24, 16, seed=1).float()
        assert torch.equal(ops.Linear(weight)(x), torch.nn.functional.linear(x, weight))
        assert torch.equal(ops.rms_norm(x, weight[0], 1e-5), reference.rms_norm(x, weight[0], 1e-5))
    finally:
        native_build.loaded.cache_clear()


def test_a_failing_compiler_is_named_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "bad-cc"
    compiler.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(native_build, "compiler", lambda: str(compiler))
    with pytest.raises(native_build.BuildError, match="no such option"):
        native_build.build(tmp_path / "cache", "avx2")
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.timeout(180)
def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEDDLE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native_build, "loaded", functools.cache(native_build.loaded.__wrapped__))
    assert native_build.find(native_build.levels()[0]) is None
    assert native_build.library() is not None
    (built,) = (tmp_path / "native").iterdir()
    assert native_build.find(native_build.level()) == built
    native_build.loaded.cache_clear()
    monkeypatch.setattr(native_build, "build", lambda folder, level: pytest.fail("compiled twice"))
    assert native_build.library() is not None


@pytest.mark.timeout(180)
def test_a_compiler_older_than_the_processor_makes_what_it_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "old-cc"
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *x86-64-v4*) echo "bad value" >&2; exit 1;; esac\nexec {native_build.compiler()} "$@"\n'
    )
    old.chmod(0o755)
    monkeypatch.setenv("CC", str(old))
    monkeypatch.setenv("HEDDLE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native_build, "levels", lambda: list(native_build.LEVELS))
    with pytest.warns(RuntimeWarning, match="bad value"):
        level, library = native_build.loaded.__wrapped__()
    assert (level, library is not None) == ("avx2", True)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("level", [name for name in native_build.LEVELS if name != native_build.level()])
def test_it_can_be_compiled_for_other_processors(tmp_path: Path, level: str) -> None:
    built = native_build.build(tmp_path, level)
    assert built.name == native_build.file_name(level) != native_build.file_name(native_build.level())
    native_build.load(built)


def test_a_lower_level_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEDDLE_CPU_LEVEL", "avx2")
    assert native_build.levels() == ["avx2"]
    monkeypatch.setenv("HEDDLE_CPU_LEVEL", "sse")
    with pytest.raises(ValueError, match="HEDDLE_CPU_LEVEL=sse: not one of amx, avx512, avx2"):
        native_build.levels()


def test_a_library_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(native_build.BuildError, match="broken"):
        native_build.load(broken)


def test_memory_for_weights_is_nobody_elses_and_is_given_back() -> None:
    sizes = (1, 3, 70_000, 1 << 20, 9 << 20)
    tensors = [memory.empty(size, 2, dtype=torch.bfloat16).fill_(i) for i, size in enumerate(sizes)]
    apart = [memory.zeros(size, torch.float32) for size in (1, 5 << 20)]
    assert [tensor.shape for tensor in tensors] == [(size, 2) for size in sizes]
    assert all((tensor == i).all() for i, tensor in enumerate(tensors))
    assert all((tensor == 0).all() for tensor in apart)
    assert apart[1].data_ptr() % memory.HUGE_BYTES == 0
    assert apart[1].untyped_storage().nbytes() < apart[1].nbytes + 2 * memory.HUGE_BYTES, "nothing but itself is kept"


def test_without_huge_pages_memory_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert (memory.zeros(3 << 20, torch.float32) == 0).all()
