"""Measures the latency model of a decoder on its device. Knows the clock; the model's formula is in common.latency."""

from __future__ import annotations

import time

import torch

from common.latency import make_profile
from common.messages import LatencyProfile
from services.executor.batch import Segment, build_batch
from services.executor.model import Decoder, KvCache

POINTS = (1, 8, 16, 32, 64, 128, 256)
REPEATS = 3
"""The fastest of them counts: other processes only ever add time, and the online correction knows them."""
BACKWARD_FACTOR = 2.0
"""Backward of frozen weights computes input gradients and recomputes cheap activations: about twice a forward pass's work."""


@torch.inference_mode()
def measure_profile(decoder: Decoder, cache: KvCache, max_tokens: int) -> LatencyProfile:
    """The latency profile from a few passes of each size, about two seconds; overwrites the cache's first slots."""
    measured = []
    for num_tokens in (n for n in POINTS if n <= max_tokens):
        _pass_ms(decoder, cache, num_tokens)
        measured.append((num_tokens, min(_pass_ms(decoder, cache, num_tokens) for _ in range(REPEATS))))
    slope = (measured[-1][1] - measured[0][1]) / max(1, measured[-1][0] - measured[0][0])
    return make_profile(measured, backward_ms_per_token=BACKWARD_FACTOR * max(slope, 1e-3))


def _pass_ms(decoder: Decoder, cache: KvCache, num_tokens: int) -> float:
    rows = range(num_tokens)
    segment = Segment(tokens=[0] * num_tokens, positions=rows, context_slots=(), slots=rows, wants_logits="all")
    batch = build_batch([segment], decoder.device)
    started_at = time.perf_counter()
    decoder.logits(decoder.forward(batch, cache))[0, 0].item()
    return (time.perf_counter() - started_at) * 1e3
