"""Measures the latency model of a decoder on its device. Knows the clock; the model's formula is in common.latency."""

from __future__ import annotations

import time

import torch

from common.latency import Rows, context_costs, make_profile
from common.messages import LatencyProfile
from services.executor.batch import Segment
from services.executor.features import FeatureWish, PassFeatures
from services.executor.logprobs import score
from services.executor.model import Decoder, KvCache
from services.executor.model_config import ModelConfig
from services.executor.passes import Passes

POINTS = (1, 8, 16, 32, 64, 128, 256)
GPU_POINTS = (*POINTS, 512, 1024, 2048)
"""A GPU is not busy with 256 rows, and what they cost says nothing of more."""
CONTEXT_TOKENS = 1024
CONTEXT_ROWS = 64
"""The two passes behind a context have 1 and this many rows: one of the points, whose pass without it is measured.
More rows than these are prompts, of which only the last row needs logits."""
SCORED_ROWS = 32
"""Rows of the measurement of scoring."""
NUM_SLOTS = max(CONTEXT_TOKENS + CONTEXT_ROWS, GPU_POINTS[-1])
"""Cache slots that the measurement needs."""
REPEATS = 3
"""The fastest of them counts: other processes only ever add time, and the online correction knows them."""
BACKWARD_FACTOR = 2.0
"""Backward of frozen weights computes input gradients and recomputes cheap activations: about twice a forward pass's work."""


@torch.inference_mode()
def measure_profile(decoder: Decoder, cache: KvCache, max_tokens: int, max_graph_tokens: int = 0) -> LatencyProfile:
    """The latency profile from a few passes of each size, about two seconds; overwrites NUM_SLOTS slots of the cache.

    On a GPU passes of up to `max_graph_tokens` rows are recorded and replayed, as an engine does.
    """
    measured, passes = [], Passes(decoder, cache, max_graph_tokens)
    max_positions = decoder.config.max_position_embeddings
    points = GPU_POINTS if decoder.device.type == "cuda" else POINTS
    for num_tokens in (n for n in points if n <= min(max_tokens, max_positions)):
        _pass_ms(passes, num_tokens)
        measured.append((num_tokens, min(_pass_ms(passes, num_tokens) for _ in range(REPEATS))))
    per_context_token, per_row_context = _context_costs(decoder.config, passes, measured)
    slope = max(1e-3, (measured[-1][1] - measured[0][1]) / max(1, measured[-1][0] - measured[0][0]))
    return make_profile(
        measured,
        ms_per_context_token=per_context_token,
        ms_per_row_context=per_row_context or slope * attention_share(decoder.config),
        ms_per_scored_row=min(_scoring_ms(decoder) for _ in range(REPEATS + 1)) / SCORED_ROWS,
        backward_ms_per_token=BACKWARD_FACTOR * slope,
    )


def attention_share(config: ModelConfig) -> float:
    """Multiplications of one row's attention to one token, relative to those of a row's linears: what attention costs if it is
    as efficient as they are. A busy machine may measure no cost at all, and no factor would ever correct zero.
    """
    q, k, v = config.qkv_sizes
    linears = config.hidden_size * (2 * q + k + v + 3 * config.intermediate_size)
    return 2 * q / linears


def _context_costs(config: ModelConfig, passes: Passes, measured: list[tuple[int, float]]) -> tuple[float, float]:
    """Two passes behind a context, one row and many; (0, 0) for a model whose positions leave no room for them."""
    many, many_ms = max((point for point in measured if point[0] <= CONTEXT_ROWS), key=lambda point: point[0])
    num_context = min(CONTEXT_TOKENS, config.max_position_embeddings - many)
    if many == 1 or num_context < 1:
        return 0.0, 0.0
    slower = []
    for num_tokens, alone_ms in (measured[0], (many, many_ms)):
        behind_ms = min(_pass_ms(passes, num_tokens, num_context) for _ in range(REPEATS + 1))
        slower.append((Rows().with_segment(num_tokens, num_context), behind_ms - alone_ms))
    return context_costs(slower[0], slower[1])


def _scoring_ms(decoder: Decoder) -> float:
    """What log probabilities of SCORED_ROWS rows take, with the head that they need; one alternative each."""
    hidden_RH = torch.ones(SCORED_ROWS, decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device)
    started_at = time.perf_counter()
    score(decoder.logits(hidden_RH), [0] * SCORED_ROWS, 1)  # it waits for the device
    return (time.perf_counter() - started_at) * 1e3


def _pass_ms(passes: Passes, num_tokens: int, context_tokens: int = 0) -> float:
    rows = range(context_tokens, context_tokens + num_tokens)
    wants_logits = "all" if num_tokens <= CONTEXT_ROWS else "last"
    segment = Segment(
        tokens=[0] * num_tokens, positions=rows, context_slots=range(context_tokens), slots=rows, wants_logits=wants_logits
    )
    started_at = time.perf_counter()
    logits_RV = passes.run([segment], PassFeatures(FeatureWish())).logits_RV
    assert logits_RV is not None
    logits_RV[0, 0].item()
    return (time.perf_counter() - started_at) * 1e3
