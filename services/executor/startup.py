"""From a configuration to a ready engine: weights, KV pool, latency profile. Knows no requests."""

from __future__ import annotations

import platform
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
import torch

from services.executor.config import ExecutorConfig
from services.executor.engine import Engine
from services.executor.loader import choose_dtype, load_decoder
from services.executor.model import KvCache
from services.executor.model_config import read_model_config
from services.executor.profile_store import ProfileStore
from services.executor.profiling import NUM_SLOTS, measure_profile
from services.executor.scheduler import Limits

PROFILE_TERMS = "row-context"
"""The newest term of the latency model, in the key: profiles of before would be read, but lack it for ever."""
log = structlog.get_logger()

OnDevice = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function on the device's thread."""


async def make_engine(config: ExecutorConfig, model: str, profiles: ProfileStore, on_device: OnDevice) -> Engine:
    """Load the model, recall its latency profile or measure it, and build the engine."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    folder = Path(config.model_dir)
    dtype = choose_dtype(config.dtype, read_model_config(folder), device)
    decoder = await on_device(lambda: load_decoder(folder, dtype, device))
    key = profile_key(model, dtype, device)
    profile = await profiles.recall(key)
    if profile is None:
        scratch = KvCache(decoder.config, NUM_SLOTS, dtype, device)
        profile = await on_device(lambda: measure_profile(decoder, scratch, config.max_batch_tokens))
        await profiles.keep(key, profile)
    log.info("executor.profile", key=key, points=profile.points, backward_ms_per_token=profile.backward_ms_per_token)
    return Engine(
        decoder,
        num_pages=config.kv_cache_tokens // config.page_size,
        page_size=config.page_size,
        profile=profile,
        limits=Limits(
            max_iteration_ms=config.max_iteration_ms,
            idle_iteration_ms=config.idle_iteration_ms,
            max_batch_tokens=config.max_batch_tokens,
            finetune_weight=config.finetune_weight,
            min_finetune_share=config.min_finetune_share,
        ),
        max_model_len=config.max_model_len,
        max_sequences=config.max_sequences,
        max_tree_nodes=config.max_tree_nodes,
        prefix_cache=config.prefix_cache,
        executor_id=config.instance_id,
    )


def profile_key(model: str, dtype: torch.dtype, device: torch.device) -> str:
    """Under what a profile is kept: all that the latency depends on."""
    dtype_name = str(dtype).removeprefix("torch.")
    return f"{platform.node()}.{model}.{device.type}.{dtype_name}.{torch.get_num_threads()}.{PROFILE_TERMS}"
