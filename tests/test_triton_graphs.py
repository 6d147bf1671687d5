"""A padded pass has the bits of one without padding, and writes the same keys and values; on a GPU a recording equals it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.triton_stage as stage
from kernels import ops
from services.executor.batch import Segment
from services.executor.features import FeatureWish, PassFeatures
from services.executor.graphs import GRAPH_SIZES, GraphKey, PaddedPass, graph_key
from services.executor.loader import load_decoder
from services.executor.model import Decoder, KvCache
from services.executor.passes import Passes
from tests.helpers import assert_close_in_norm, tiny_model
from tests.tiny import random_prompt

TREE = (-1, 0, 0, 1, 1, 2, 3)
DEPTHS = (0, 1, 1, 2, 2, 2, 3)
LAYERS = (1, 2)
SHAPE: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
NUM_SLOTS = 256


def decoder_of(family: str, folder: Path, dtype: torch.dtype) -> Decoder:
    options = {"sliding_window": 6} if family == "mistral" else {}
    tiny_model(family, **SHAPE, **options).save_pretrained(folder)
    return load_decoder(folder, dtype, stage.DEVICE)


def filled(decoder: Decoder) -> KvCache:
    """A cache whose contexts hold something."""
    cache = KvCache(decoder.config, NUM_SLOTS, decoder.dtype, decoder.device)
    for tensor in (*cache.k, *cache.v):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(tensor))))
    return cache


def decode(num_context: int, first_slot: int) -> Segment:
    slots = range(first_slot, first_slot + num_context + 1)
    tokens = random_prompt(1, seed=first_slot, vocab_size=61)
    return Segment(
        tokens=tokens, positions=[num_context], context_slots=slots[:-1], slots=slots[-1:], wants_logits="all"
    )  # fmt: skip


def tree(num_context: int, first_slot: int) -> Segment:
    slots = range(first_slot, first_slot + num_context + len(TREE))
    return Segment(
        tokens=random_prompt(len(TREE), seed=first_slot, vocab_size=61), positions=[num_context + depth for depth in DEPTHS],
        context_slots=slots[:num_context], slots=slots[num_context:], parents=TREE, wants_logits="all",
    )  # fmt: skip


BATCHES = {
    "one root": [decode(9, 0)],
    "roots": [decode(9, 0), decode(40, 20), decode(0, 80)],
    "roots and trees": [tree(20, 0), decode(7, 40), tree(5, 60), decode(33, 100)],
}


def eager(decoder: Decoder, segments: list[Segment], cache: KvCache) -> tuple[Tensor, list[Tensor]]:
    features = PassFeatures(FeatureWish(LAYERS, 1))
    logits = Passes(decoder, cache).run(segments, features).logits_RV
    assert logits is not None
    return logits, features.states


@pytest.mark.skipif(stage.HAS_GPU, reason="a GPU's products depend on the number of rows")
@pytest.mark.parametrize(("batch", "family"), [("one root", "llama"), ("roots", "mistral"), ("roots and trees", "llama")])
def test_padding_changes_no_bit(batch: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "interprets_triton", True)
    monkeypatch.setattr("kernels.triton_ops.attention_tables.SPLIT_KEYS", 16)  # so that contexts are split
    decoder, segments = decoder_of(family, tmp_path, torch.float32), BATCHES[batch]
    key = graph_key(segments, (5, 24), 4, LAYERS)
    assert key is not None
    caches = [filled(decoder) for _ in range(2)]
    expected, expected_states = eager(decoder, segments, caches[0])
    padded = PaddedPass(decoder, caches[1], key)
    assert padded.fill([decode(30, 200)] * 2), "what was there before leaves nothing behind"
    assert padded.fill(segments)
    _, logits, states = padded.compute()
    assert len(logits) == key.num_rows > len(expected)
    assert torch.equal(logits[: len(expected)], expected)
    for state, wanted in zip(states, expected_states, strict=True):
        assert torch.equal(state[: len(wanted)], wanted)
    for ours, wanted in zip((*caches[1].k, *caches[1].v), (*caches[0].k, *caches[0].v), strict=True):
        assert torch.equal(ours, wanted), "padded rows wrote somewhere"


def test_more_keys_than_there_is_room_for(tmp_path: Path) -> None:
    decoder = decoder_of("llama", tmp_path, torch.float32)
    padded = PaddedPass(decoder, filled(decoder), GraphKey(16, False))
    shared = decode(NUM_SLOTS - 1, 0)
    assert padded.fill([shared])
    assert not padded.fill([shared, shared]), "two requests on one cached prefix"


@pytest.mark.gpu
@pytest.mark.skipif(not stage.HAS_GPU, reason="graphs are recorded on CUDA devices")
@pytest.mark.parametrize("batch", BATCHES)
def test_a_replay_equals_the_eager_pass(batch: str, tmp_path: Path) -> None:
    decoder, segments = decoder_of("llama", tmp_path, torch.bfloat16), BATCHES[batch]
    caches = [filled(decoder) for _ in range(2)]
    for each in (BATCHES["roots"], segments):
        expected, _ = eager(decoder, each, caches[0])
    passes = Passes(decoder, caches[1], 256)
    assert passes.record_all(LAYERS) == 2 * len(GRAPH_SIZES)
    for each in (BATCHES["roots"], segments):  # the replay before leaves nothing behind
        features = PassFeatures(FeatureWish(LAYERS, 1))
        with torch.inference_mode():
            ran = passes.run(each, features)
    assert ran.is_replay
    assert ran.logits_RV is not None
    assert_close_in_norm(ran.logits_RV.float(), expected.double(), 2e-2)
    assert len(features.states) == len(LAYERS)
