"""The GPU benchmark's stages of whole iterations: ours, and transformers' with a static cache, against the roofline.

A roofline's time is what reading every weight once takes at the speed of a copy; the floor counts contexts and arithmetic too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_device import Ceilings, Device, Times
from benchmarks.gpu_model import (
    DRAFT_BUDGET,
    LLAMA_3_1_8B,
    TINY,
    Load,
    LoadedModel,
    context_bytes,
    loads,
    random_decoder,
    weight_bytes,
)
from benchmarks.gpu_results import Results, Row
from services.executor.model_config import ModelConfig

STAGE, PEER_STAGE = "iteration", "peer"
DECODES, TINY_DECODES = (1, 16, 64, 256), (2,)
CONTEXT, TINY_CONTEXT = 1024, 8
WINDOW, TINY_WINDOW = 256, 2
PEER = "transformers, static cache"


def run(device: Device, dtype: torch.dtype, top: Ceilings, results: Results, *, is_tiny: bool) -> None:
    """A row per load, of whole passes: tables, layers, head, and the drawn tokens on the host."""
    config, num_context = (TINY, TINY_CONTEXT) if is_tiny else (LLAMA_3_1_8B, CONTEXT)
    every = loads(TINY_DECODES, 4, TINY_WINDOW) if is_tiny else loads(DECODES, DRAFT_BUDGET, WINDOW)
    model = LoadedModel(random_decoder(config, dtype, device.torch), num_context, max(every, key=lambda load: load.num_rows))
    for load in every:
        has_graph = device.torch.type == "cuda" and not load.num_window_rows
        for is_recorded in (False, True)[: 1 + has_graph]:
            call = model.call(load, is_recorded=is_recorded)
            provider = "heddle, graph" if is_recorded else "heddle"
            results.add(STAGE, _row(provider, load, call, config, device, dtype, top, num_context))
        device.forget()


def run_peer(device: Device, dtype: torch.dtype, top: Ceilings, results: Results, *, is_tiny: bool) -> None:
    """The plain loads by transformers; on a GPU compiled, which takes a minute for each."""
    config, num_context = (TINY, TINY_CONTEXT) if is_tiny else (LLAMA_3_1_8B, CONTEXT)
    model = _peer_model(config, dtype, device)
    provider = PEER if is_tiny else f"{PEER}, compiled"
    for num_decodes in TINY_DECODES if is_tiny else DECODES:
        call = _peer_pass(model, num_decodes, num_context, device, is_compiled=not is_tiny)
        load = Load(num_decodes=num_decodes)
        results.add(PEER_STAGE, _row(provider, load, call, config, device, dtype, top, num_context))
        del call
        torch.compiler.reset()
        device.forget()


def _row(
    provider: str, load: Load, call: Callable[[], object], config: ModelConfig, device: Device, dtype: torch.dtype,
    top: Ceilings, num_context: int,
) -> Row:  # fmt: skip
    times: Times = device.wall(call)
    weights = weight_bytes(config, dtype)
    roofline_ms = weights / top.copy_gb_s / 1e6
    memory_ms = (weights + context_bytes(config, load, num_context, dtype)) / top.copy_gb_s / 1e6
    arithmetic_ms = 2 * load.num_rows * weights / dtype.itemsize / top.matmul_tflop_s / 1e9
    return {
        "decodes": load.num_decodes, "load": load.name, "rows": load.num_rows, "context": num_context, "provider": provider,
        **times._asdict(), "roofline_ms": roofline_ms, "floor_ms": max(memory_ms, arithmetic_ms),
        "of_roofline": roofline_ms / times.p50_ms, "tokens_s": load.num_decodes / times.p50_ms * 1e3,
        **device.launches(call)._asdict(),
    }  # fmt: skip


def _peer_model(config: ModelConfig, dtype: torch.dtype, device: Device) -> Any:
    transformers: Any = importlib.import_module("transformers")
    rope = config.rope
    assert rope.bands is not None
    scaling = {
        "rope_type": "llama3", "factor": rope.factor, "low_freq_factor": rope.bands.low, "rope_theta": rope.theta,
        "high_freq_factor": rope.bands.high, "original_max_position_embeddings": rope.bands.original_positions,
    }  # fmt: skip
    llama = transformers.LlamaConfig(
        hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size, rms_norm_eps=config.rms_norm_eps, rope_parameters=scaling, tie_word_embeddings=False,
        max_position_embeddings=config.max_position_embeddings, attn_implementation="sdpa",
    )  # fmt: skip
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # else the weights would be made in float32 first
    try:
        with device.torch:
            return transformers.LlamaForCausalLM(llama).eval()
    finally:
        torch.set_default_dtype(usual)


def _peer_pass(
    model: Any, num_decodes: int, num_context: int, device: Device, *, is_compiled: bool
) -> Callable[[], list[list[int]]]:
    """A step of so many sequences behind a cache of their contexts; its tokens on the host.

    Every step goes one token further, to the cache's end and then from the context again: attention reads all of it anyway.
    """
    transformers: Any = importlib.import_module("transformers")
    cache = transformers.StaticCache(config=model.config, max_cache_len=num_context + 1)
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if is_compiled else model.forward
    ids = torch.ones((num_decodes, 1), dtype=torch.int64, device=device.torch)
    positions = torch.full((num_decodes, 1), num_context, dtype=torch.int64, device=device.torch)

    @torch.no_grad()
    def run() -> list[list[int]]:
        _rewind(cache, num_context)
        logits: Tensor = step(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits
        found: list[list[int]] = logits.argmax(-1).tolist()
        return found

    with torch.no_grad():  # makes the cache's tensors
        model.forward(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return run


def _rewind(cache: Any, num_context: int) -> None:
    """The caches that count their tokens have so many now; others are told a position by the step."""
    for layer in cache.layers:
        if isinstance(count := getattr(layer, "cumulative_length", None), torch.Tensor):
            count.fill_(num_context)
