"""All layers as one operation of the compiled library: its bits and its cache are those of the layers one by one."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from common.messages import LoraSpec
from kernels.native.build import library
from services.executor.batch import Segment, build_batch
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder, KvCache
from tests.bottleneck_oracle import random_bottleneck
from tests.helpers import CPU, OperatorCount, as_decoder, randn, tiny_model
from tests.tiny import SHAPE, tiny_pair

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler, or no AVX2")

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
}
TARGETS = (("q_proj", "v_proj"), ("k_proj", "o_proj", "up_proj", "down_proj"), LoraSpec().target_modules)


@functools.cache
def decoder_of(family: str, dtype: torch.dtype) -> Decoder:
    with tempfile.TemporaryDirectory() as folder:
        return as_decoder(tiny_model(family, **(SHAPE | WIDE | FAMILIES[family])), Path(folder), dtype)


def adapter(decoder: Decoder, index: int, dtype: torch.dtype) -> LoraAdapter:
    """With targets, rank and layers of its own."""
    spec = LoraSpec(rank=(3, 8, 17)[index % 3], alpha=4.0, target_modules=TARGETS[index % 3])
    weights = LoraWeights(spec, decoder.config, layers=[1] if index == 1 else None, dtype=dtype)
    weights.flat.copy_(0.3 * randn(*weights.flat.shape, seed=index))
    return LoraAdapter(f"a{index}", spec, weights)


def segments(num: int, adapters: list[LoraAdapter | None]) -> list[Segment]:
    """Roots, chunks and trees in turn, each behind a context of its own, the last a chunk that spans several tasks."""
    found, base = [], 0
    for i in range(num):
        context, rows = 3 + 2 * i, (1, 6, 4, 40)[3 if i == num - 1 else i % 3]
        slots = range(base, base + context + rows)
        parents = (-1, 0, 0, 1) if rows == 4 else None
        positions = [context, context + 1, context + 1, context + 2] if parents else range(context, context + rows)
        found.append(
            Segment(
                tokens=[(7 * i + j) % 90 for j in range(rows)], positions=positions, context_slots=slots[:context],
                slots=slots[context:], parents=parents, wants_logits="all", adapter=adapters[i % len(adapters)],
            )
        )  # fmt: skip
        base += context + rows
    return found


def run(decoder: Decoder, batch_of: list[Segment]) -> tuple[Tensor, list[Tensor]]:
    """Hidden states, and the caches behind the pass; before it they hold the same random context."""
    cache = KvCache(decoder.config, 256, decoder.dtype, CPU)
    for seed, tensor in enumerate((*cache.k, *cache.v)):
        tensor.copy_(randn(*tensor.shape, seed=seed))
    with torch.inference_mode():
        return decoder.forward(build_batch(batch_of, CPU), cache), [*cache.k, *cache.v]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bottleneck_goes_layer_by_layer_and_no_bit_of_the_others_changes(dtype: torch.dtype) -> None:
    decoder = decoder_of("llama", dtype)
    spec = LoraSpec(method="bottleneck", rank=5, non_linearity="gelu", target_modules=("o_proj", "down_proj"))
    lora, own = adapter(decoder, 2, dtype), random_bottleneck(decoder, spec, dtype=dtype)
    stack = mock.Mock(wraps=decoder.stack)
    with mock.patch.object(decoder, "stack", stack):
        expected_TH, expected = run(decoder, segments(7, [None, lora, None]))
        assert stack.call_count == 1, "without a bottleneck the stack runs"
        hidden_TH, caches = run(decoder, batch := segments(7, [None, lora, own]))
        assert stack.call_count == 1, "with one it does not"
    ends = list(itertools.accumulate(len(segment.tokens) for segment in batch))
    for segment, start, end in zip(batch, [0, *ends], ends, strict=False):
        is_same = torch.equal(hidden_TH[start:end], expected_TH[start:end])
        assert is_same == (segment.adapter is not own)
        slots = list(segment.slots)
        if is_same:
            assert all(torch.equal(mine[slots], theirs[slots]) for mine, theirs in zip(caches, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stack_gives_the_bits_of_its_layers(family: str, dtype: torch.dtype) -> None:
    decoder = decoder_of(family, dtype)
    assert decoder.stack is not None
    choices: list[list[LoraAdapter | None]] = [
        [None], [adapter(decoder, 0, torch.float32), None, *(adapter(decoder, i, dtype) for i in (1, 2))]
    ]  # fmt: skip
    for adapters in choices:
        for num in (1, 7):
            batch = segments(num, adapters)
            hidden_TH, caches = run(decoder, batch)
            with mock.patch.object(decoder, "stack", None):
                expected_TH, expected = run(decoder, batch)
            assert torch.equal(hidden_TH, expected_TH)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(caches, expected, strict=True))
    assert not torch.equal(run(decoder, segments(7, choices[0]))[0], run(decoder, segments(7, choices[1]))[0])


def test_what_the_library_cannot_compute_goes_through_the_layers() -> None:
    assert tiny_pair()[1].stack is None, "heads of 8 are too narrow"
    decoder = decoder_of("llama", torch.bfloat16)
    of_half = adapter(decoder, 2, torch.float16)
    with mock.patch.object(decoder, "stack", side_effect=AssertionError("an adapter in float16")):
        hidden_TH, _ = run(decoder, segments(3, [of_half]))
    assert hidden_TH.isfinite().all()


def test_its_operators_do_not_grow() -> None:
    decoder = decoder_of("llama", torch.bfloat16)
    cache, counts = KvCache(decoder.config, 256, decoder.dtype, CPU), []
    for num in (3, 8):
        batch = segments(num, [adapter(decoder, i, torch.bfloat16) for i in range(num)])
        with torch.inference_mode(), OperatorCount() as operators:
            decoder.forward(build_batch(batch, CPU), cache)
        counts.append(operators.by_name)
    assert counts[0] == counts[1] != Counter()
    assert counts[0].total() < 15, "one by one the layers are more"
