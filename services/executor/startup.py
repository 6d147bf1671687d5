"""From a configuration to a ready engine: weights, KV pool, latency profile. Knows no requests."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Awaitable, Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import structlog
import torch

from common.config import ConfigError
from common.messages import LatencyProfile
from common.sharing import parse_sharing
from kernels import ops
from kernels.native.build import level
from kernels.version import kernels_version
from services.executor.config import ExecutorConfig
from services.executor.device import choose_device, is_out_of_memory, memory_bytes
from services.executor.engine import Engine
from services.executor.loader import choose_dtype, load_decoder
from services.executor.model import Decoder, KvCache
from services.executor.model_config import ModelConfig, read_model_config
from services.executor.profile_store import ProfileStore
from services.executor.profiling import NUM_SLOTS, measure_profile
from services.executor.views import Limits

PROFILE_TERMS = "row-context.scored-row"
"""The newest term of the latency model, in the key: profiles of before would be read, but lack it for ever."""
log = structlog.get_logger()

POOL_SETTING = "HEDDLE_EXECUTOR_KV_CACHE_TOKENS (heddle up --kv-cache-tokens)"

OnDevice = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function on the device's thread."""


async def make_engine(config: ExecutorConfig, model: str, profiles: ProfileStore, on_device: OnDevice) -> Engine:
    """Load the model, recall its latency profile or measure it, and build the engine."""
    num_threads = await claim_threads(config.threads, on_device)
    device = choose_device(config.device)
    folder = Path(config.model_dir)
    shape = read_model_config(folder)
    dtype = choose_dtype(config.dtype, shape, device)
    check_pool_fits(shape, config.kv_cache_tokens, dtype, device)
    with _out_of_memory_is(f"the weights of {folder} do not fit into memory as {dtype_name(dtype)}"):
        decoder = await on_device(lambda: load_decoder(folder, dtype, device))
    key = profile_key(model, dtype, device, num_threads, config.max_graph_tokens)
    profile = await profiles.recall(key)
    if profile is None:
        scratch = KvCache(decoder.config, NUM_SLOTS, dtype, device)
        profile = await on_device(lambda: measure_profile(decoder, scratch, config.max_batch_tokens, config.max_graph_tokens))
        await profiles.keep(key, profile)
    log.info("executor.profile", key=key, profile=msgspec.to_builtins(profile))
    with _out_of_memory_is(f"{_pool(shape, config.kv_cache_tokens, dtype)} beside the weights: lower {POOL_SETTING}"):
        engine = _engine(config, decoder, profile)
        if num_graphs := await on_device(engine.passes.record_all):
            log.info("executor.graphs", recorded=num_graphs)
        return engine


async def claim_threads(num_threads: int, on_device: OnDevice) -> int:
    """The device's thread computes with so many threads (0: as many as there are cores), the event loop's alone; returns them.

    If both had OpenMP teams, their threads would outnumber the cores, and libgomp would put them to sleep after every
    operation: measured on 2 cores, a pass of one token took 63 ms instead of 18.
    """
    num_threads = num_threads or torch.get_num_threads()
    torch.set_num_threads(1)
    await on_device(lambda: torch.set_num_threads(num_threads))
    return num_threads


@contextlib.contextmanager
def _out_of_memory_is(reason: str) -> Iterator[None]:
    """Turns an allocation that failed into a ConfigError with this reason."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ConfigError(reason) from error
        raise


def check_pool_fits(shape: ModelConfig, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError for a KV pool larger than the device: a CPU would promise that memory, and kill us when we use it."""
    has_bytes = memory_bytes(device)
    if KvCache.num_bytes(shape, num_tokens, dtype) > has_bytes:
        where = "this machine" if device.type == "cpu" else str(device)
        raise ConfigError(f"{_pool(shape, num_tokens, dtype)}; {where} has {has_bytes / 1e9:.1f} GB: lower {POOL_SETTING}")


def _pool(shape: ModelConfig, num_tokens: int, dtype: torch.dtype) -> str:
    size_gb = KvCache.num_bytes(shape, num_tokens, dtype) / 1e9
    return f"a KV cache of {num_tokens} tokens takes {size_gb:.1f} GB as {dtype_name(dtype)}, which does not fit"


def _engine(config: ExecutorConfig, decoder: Decoder, profile: LatencyProfile) -> Engine:
    return Engine(
        decoder,
        num_pages=config.kv_cache_tokens // config.page_size,
        page_size=config.page_size,
        profile=profile,
        limits=Limits(
            max_iteration_ms=config.max_iteration_ms,
            max_prefill_ms=config.max_prefill_ms,
            idle_iteration_ms=config.idle_iteration_ms,
            interruptible_ms=config.interruptible_ms,
            max_batch_tokens=config.max_batch_tokens,
            finetune_weight=config.finetune_weight,
            min_finetune_share=config.min_finetune_share,
        ),
        max_model_len=config.max_model_len,
        max_sequences=config.max_sequences,
        max_tree_nodes=config.max_tree_nodes,
        max_draft_tokens=config.max_draft_tokens,
        prefix_cache=config.prefix_cache,
        max_graph_tokens=config.max_graph_tokens,
        num_cohorts=config.cohorts,
        sharing=parse_sharing(config.finetune_sharing),
        executor_id=config.instance_id,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As settings call it."""
    return str(dtype).removeprefix("torch.")


def profile_key(model: str, dtype: torch.dtype, device: torch.device, num_threads: int, max_graph_tokens: int = 0) -> str:
    """Under what a profile is kept: all that the latency depends on, so also this release, its kernels and their choice, and
    how large passes are replayed from graphs.
    """
    kernels = f"{kernels_version()}.triton" if ops.interprets_triton else kernels_version()
    if device.type == "cuda":
        kernels = f"{kernels}.graphs-{max_graph_tokens}"
    elif device.type == "cpu":
        kernels = f"{kernels}.{level()}"
    code = f"{PROFILE_TERMS}.{version('heddle')}.{kernels}"
    return f"{platform.node()}.{model}.{device.type}.{dtype_name(dtype)}.{num_threads}.{code}"
