"""With compiled operations a token is the same bit for bit, in bfloat16 too: alone, batched, drafted, chunked, preempted."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from common.messages import LoraSpec, Sampling
from kernels.native.build import library
from services.executor.model import Decoder
from services.executor.views import Limits
from tests.drafts import oracle_draft
from tests.helpers import as_decoder, random_adapter, tiny_model
from tests.tiny import NUM_TOKENS, PROMPTS, SHAPE, Driver, serve, tiny_engine, tiny_request

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler, or no AVX2")

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
DTYPES = [torch.bfloat16, torch.float32]


def decoder_of(dtype: torch.dtype) -> Decoder:
    with tempfile.TemporaryDirectory() as folder:
        return as_decoder(tiny_model("llama", **(SHAPE | WIDE)), Path(folder), dtype)


def requests() -> list[Any]:
    """Half of them sampled at temperature 1: the least difference in a logit shows in what is drawn."""
    return [
        tiny_request(name, prompt, NUM_TOKENS, sampling=Sampling(temperature=float(i % 2), seed=i), logprobs=2)
        for i, (name, prompt) in enumerate(PROMPTS.items())
    ]


def results(driver: Driver) -> dict[str, tuple[Any, Any]]:
    """Tokens and their log probabilities of each request; floats are compared bit for bit."""
    logprobs: dict[str, list[Any]] = {name: [] for name in PROMPTS}
    for iteration in driver.iterations:
        for chunk in iteration.chunks:
            if chunk.logprobs is not None:
                logprobs[chunk.request_id] += chunk.logprobs.chosen
    return {name: (tokens, logprobs[name]) for name, tokens in driver.streams.tokens.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_shares_a_pass_changes_no_bit(dtype: torch.dtype) -> None:
    decoder = decoder_of(dtype)
    alone: dict[str, tuple[Any, Any]] = {}
    for request in requests():
        alone |= {request.request_id: results(serve(decoder, request))[request.request_id]}
    assert all(len(tokens) == NUM_TOKENS for tokens, _ in alone.values())
    truth = {name: tokens for name, (tokens, _) in alone.items()}
    together = serve(decoder, *requests())
    assert results(together) == alone
    chunked = serve(decoder, *requests(), engine=tiny_engine(decoder, limits=Limits(max_batch_tokens=7, min_prefill_tokens=3)))
    assert results(chunked) == alone
    for seed in range(3):
        drafted = serve(decoder, *requests(), draft=oracle_draft(truth, seed))
        assert drafted.engine.counters["accepted_tokens"] > 30
        assert results(drafted) == alone
    short = serve(decoder, *requests(), draft=oracle_draft(truth), engine=tiny_engine(decoder, num_pages=18))
    assert short.engine.counters["preemptions"] > 0
    assert results(short) == alone


def test_nor_do_other_adapters() -> None:
    decoder = decoder_of(torch.bfloat16)
    names = {"r1": "a", "r2": "d", "r3": "b", "r4": "a", "r5": "c"}
    adapters = {name: random_adapter(decoder, LoraSpec(rank=rank), seed=rank) for name, rank in (("a", 4), ("b", 8), ("c", 3))}
    bottleneck = LoraSpec(method="bottleneck", rank=5, non_linearity="gelu", target_modules=("o_proj", "down_proj"))
    adapters["d"] = random_adapter(decoder, bottleneck)

    def run(*chosen: Any) -> dict[str, tuple[Any, Any]]:
        engine = tiny_engine(decoder)
        engine.adapters.update(adapters)
        return results(serve(decoder, *chosen, adapters=names, engine=engine))

    alone: dict[str, tuple[Any, Any]] = {}
    for request in requests():
        alone |= run(request)
    assert run(*requests()) == alone
    plain = results(serve(decoder, *requests()))
    assert {name for name, result in plain.items() if result != alone[name]} == set(names)
