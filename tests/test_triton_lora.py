"""Segmented LoRA in Triton, forward and both backward passes, against the reference in fp64: mixes of adapters and ranks."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import pytest
import torch
from torch import Tensor

import tests.triton_stage as stage
from kernels import reference
from kernels.segments import LoraSegment
from kernels.triton_ops import segmented_lora as module
from tests.helpers import assert_matches, randn

Grads = list[tuple[Tensor, Tensor]]


def segmented_lora(y: Tensor, x: Tensor, segments: list[LoraSegment]) -> None:
    module.segmented_lora(y, x, module.checked_tables(segments, len(y), x.shape[1], y.shape[1]))


def segmented_lora_backward(dx: Tensor, dy: Tensor, segments: list[LoraSegment]) -> None:
    tables = module.checked_tables(segments, len(dy), dx.shape[1], dy.shape[1])
    module.segmented_lora_gradients(dx, dy, None, None, tables, dx.shape[1])


def segmented_lora_weight_backward(grads: Grads, dy: Tensor, x: Tensor, segments: list[LoraSegment]) -> None:
    tables = module.checked_tables(segments, len(dy), x.shape[1], dy.shape[1])
    module.segmented_lora_gradients(None, dy, x, grads, tables, x.shape[1])


NUM_ROWS, INPUTS, OUTPUTS = 40, 48, 136
ZIPF = [0, 20, 30, 35, 38, 39, 40]
MIXES: dict[str, list[tuple[int, int, int]]] = {
    "none": [],
    "one for all": [(0, 40, 0)],
    "distinct": [(i, i + 1, i) for i in range(12)],
    "zipf": [(start, end, i) for i, (start, end) in enumerate(itertools.pairwise(ZIPF))],
    "skewed": [(0, 39, 0), (39, 40, 1)],
    "tile edges and idle rows": [(0, 16, 1), (17, 32, 2), (32, 39, 3)],
    "identical in several places": [(0, 3, 2), (5, 9, 2), (9, 27, 2)],
    "no rows": [(4, 4, 0)],
    "no rows beside some": [(4, 4, 0), (4, 6, 3)],
}
RANKS = (4, 1, 8, 17)


OURS = sys.modules[__name__]


def segments_of(mix: list[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> list[LoraSegment]:
    """Adapter i has rank RANKS[i % 4]; the numbers are exact in half precision."""
    segments = []
    for start, end, i in mix:
        rank = RANKS[i % len(RANKS)]
        a_RI = randn(rank, INPUTS, dtype=torch.bfloat16, seed=10 + i) / 8
        b_OR = randn(OUTPUTS, rank, dtype=torch.bfloat16, seed=50 + i) / 4
        a_RI, b_OR = a_RI.to(device, dtype), b_OR.to(device, dtype)
        segments.append(LoraSegment(start=start, end=end, a_RI=a_RI, b_OR=b_OR, scale=0.5 + i / 4))
    return segments


CPU = torch.device("cpu")
both = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)


TYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    pytest.param(torch.bfloat16, torch.bfloat16, marks=stage.BF16.marks),
    pytest.param(torch.bfloat16, torch.float32, marks=stage.BF16.marks),
]


@both
@pytest.mark.parametrize(("dtype", "adapter_dtype"), TYPES, ids=str)
def test_forward_and_input_gradient(
    mix: list[tuple[int, int, int]], dtype: torch.dtype, adapter_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COLUMNS", 32)
    monkeypatch.setattr(module, "PART_COLUMNS", 64)
    x, y = randn(NUM_ROWS, INPUTS, dtype=dtype), randn(NUM_ROWS, OUTPUTS, dtype=dtype, seed=1)
    oracle = segments_of(mix, torch.float64, CPU)
    subject = segments_of(mix, adapter_dtype, stage.DEVICE)
    narrow_x, narrow_y = stage.put(x, dtype), stage.put(y, dtype)
    forward, backward = stage.put(y, dtype), stage.put(x, dtype)
    segmented_lora(forward, narrow_x, subject)
    segmented_lora_backward(backward, narrow_y, subject)
    expected_forward, expected_backward = y.clone(), x.clone()
    reference.segmented_lora(expected_forward, x, oracle)
    reference.segmented_lora_backward(expected_backward, y, oracle)
    assert_matches(forward.cpu(), expected_forward)
    assert_matches(backward.cpu(), expected_backward)


@both
def test_weight_gradients(mix: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_COLUMNS", 128)
    x, dy = randn(NUM_ROWS, INPUTS, dtype=torch.float32), randn(NUM_ROWS, OUTPUTS, dtype=torch.float32, seed=1)
    oracle, subject = segments_of(mix, torch.float64, CPU), segments_of(mix, torch.float32, stage.DEVICE)
    expected = [(torch.ones_like(segment.a_RI), torch.ones_like(segment.b_OR)) for segment in oracle]
    actual = [(torch.ones_like(segment.a_RI), torch.ones_like(segment.b_OR)) for segment in subject]
    reference.segmented_lora_weight_backward(expected, dy, x, oracle)
    segmented_lora_weight_backward(actual, stage.put(dy, torch.float32), stage.put(x, torch.float32), subject)
    for wanted, found in zip(expected, actual, strict=True):
        for i in range(2):
            assert_matches(found[i].cpu(), wanted[i])


def test_targets_side_by_side_update_their_own_columns() -> None:
    whole = segments_of(MIXES["zipf"], torch.float32, stage.DEVICE)
    segments = [
        dataclasses.replace(segment, b_OR=segment.b_OR[columns], column=columns.start)
        for segment in whole
        for columns in (slice(0, 40), slice(40, OUTPUTS))
    ]
    segments = [segment for i, segment in enumerate(segments) if i != 3]
    x, y = (stage.put(randn(NUM_ROWS, n, seed=n), torch.float32) for n in (INPUTS, OUTPUTS))
    results = []
    for own in (OURS, reference):
        forward, backward = y.clone(), x.clone()
        grads = [(torch.zeros_like(s.a_RI), torch.zeros_like(s.b_OR)) for s in segments]
        own.segmented_lora(forward, x, segments)
        own.segmented_lora_backward(backward, y, segments)
        own.segmented_lora_weight_backward(grads, y, x, segments)
        results.append((forward, backward, *(matrix for pair in grads for matrix in pair)))
    for actual, expected in zip(*results, strict=True):
        assert_matches(actual, expected.double())
    with pytest.raises(ValueError, match="of 100"):
        segmented_lora(y[:, :100], x, segments)


def test_a_row_gets_the_same_update_alone_and_in_a_batch() -> None:
    segments = segments_of(MIXES["zipf"], torch.float32, stage.DEVICE)
    x = stage.put(randn(NUM_ROWS, INPUTS), torch.float32)
    together, alone = (torch.zeros(NUM_ROWS, OUTPUTS, device=stage.DEVICE) for _ in range(2))
    segmented_lora(together, x, segments)
    for segment in segments:
        segmented_lora(alone, x, [segment])
    assert torch.equal(together, alone)


def test_adapters_of_two_types_in_one_batch() -> None:
    """Those that are served have the model's type, those in training fp32."""
    types = (torch.float16, torch.float32)
    mixed = [segments_of(MIXES["distinct"], types[i % 2], stage.DEVICE)[i] for i in range(12)]
    oracle = segments_of(MIXES["distinct"], torch.float64, CPU)
    x, y = randn(NUM_ROWS, INPUTS, dtype=torch.float16), randn(NUM_ROWS, OUTPUTS, dtype=torch.float16, seed=1)
    narrow = stage.put(y, torch.float16)
    segmented_lora(narrow, stage.put(x, torch.float16), mixed)
    reference.segmented_lora(y, x, oracle)
    assert_matches(narrow.cpu(), y)


def test_what_does_not_fit_is_refused() -> None:
    segments = segments_of([(0, 2, 0), (2, 4, 1)], torch.float32, stage.DEVICE)
    x, y = torch.zeros(NUM_ROWS, INPUTS, device=stage.DEVICE), torch.zeros(NUM_ROWS, OUTPUTS, device=stage.DEVICE)
    with pytest.raises(ValueError, match=r"columns 0 to 136 of 48"):
        segmented_lora(x, x, segments)
    with pytest.raises(ValueError, match="for 136 inputs"):
        segmented_lora(y, y, segments)
    with pytest.raises(ValueError, match="rows 2 to 4 of 3"):
        segmented_lora(y[:3], x[:3], segments)
    with pytest.raises(ValueError, match="leave gaps"):
        segmented_lora(y, x, [dataclasses.replace(segments[0], a_RI=segments[0].a_RI.mT.contiguous().mT)])
    with pytest.raises(ValueError, match="overlap"):
        segmented_lora(y, x, segments_of([(0, 3, 0), (2, 4, 1)], torch.float32, stage.DEVICE))
    shared = (torch.zeros_like(segments[0].a_RI), torch.zeros_like(segments[0].b_OR))
    with pytest.raises(ValueError, match="share a gradient"):
        segmented_lora_weight_backward([shared, shared], y, x, segments)
