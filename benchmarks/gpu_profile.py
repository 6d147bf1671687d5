"""bench_gpu's last stage: the latency model that an executor would measure, as JSON by model and device. Knows no bus."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from benchmarks.gpu_device import Device
from benchmarks.gpu_model import LLAMA_3_1_8B, TINY, random_decoder
from benchmarks.gpu_results import Results, slug, write_json
from benchmarks.report import commit
from services.executor.graphs import GRAPH_SIZES
from services.executor.model import KvCache
from services.executor.profiling import NUM_SLOTS, measure_profile

STAGE = "profile"
MODEL = "llama-3.1-8b"
MAX_TOKENS, TINY_MAX_TOKENS = 2048, 1


def run(device: Device, dtype: torch.dtype, results: Results, folder: Path, *, is_tiny: bool) -> Path:
    """Measure, write, and keep a row per point; returns the profile's path."""
    decoder = random_decoder(TINY if is_tiny else LLAMA_3_1_8B, dtype, device.torch)
    cache = KvCache(decoder.config, NUM_SLOTS, dtype, device.torch)
    profile = measure_profile(decoder, cache, TINY_MAX_TOKENS if is_tiny else MAX_TOKENS, GRAPH_SIZES[-1])
    model = f"{MODEL}-tiny" if is_tiny else MODEL
    path = folder / f"{model}--{slug(device.name)}.json"
    facts = {"model": model, "device": device.name, "dtype": str(dtype).removeprefix("torch."), "commit": commit()}
    write_json(path, {**facts, "profile": msgspec.to_builtins(profile)})
    for num_tokens, ms in profile.points:
        results.add(STAGE, {"tokens": num_tokens, "ms": ms})
    return path
