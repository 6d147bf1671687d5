"""Settings of an executor."""

from __future__ import annotations

import dataclasses
import os

from common.config import ConfigError, ServiceConfig, require
from common.sharing import MAX_COHORTS, parse_sharing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutorConfig(ServiceConfig):
    """One device, one base model."""

    model_dir: str
    """Hugging Face folder with safetensors weights."""
    served_model_name: str | None = None
    """The base model's name in requests; default: the folder's name."""
    device: str = "cpu"
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32."""
    threads: int = 0
    """Threads of one operation on a CPU; 0: all cores."""
    page_size: int = 16
    """Tokens per KV page."""
    kv_cache_tokens: int = 32768
    """Size of the KV pool; three quarters of it bound a single request."""
    prefix_cache: bool = True
    """Keep full pages of keys and values for later requests that begin with the same tokens, until their room is needed."""
    max_model_len: int = 8192
    max_sequences: int = 256
    max_batch_tokens: int = 1024
    max_graph_tokens: int = 256
    """Largest pass of decode roots and draft trees that a GPU replays as a recorded CUDA graph; 0: none."""
    max_tree_nodes: int = 64
    """Draft nodes that one request may send into an iteration."""
    max_draft_tokens: int = 64
    """Draft nodes of all requests in one iteration (AdaServe's budget B)."""
    speculation: bool = True
    cohorts: int = 1
    """2: one half of the decoding requests verifies while drafts for the other half are made. Pays only where drafting takes
    longer than a pass of half the requests does."""
    tree_wait_ms: float = 25.0
    """Longest that an iteration waits for its draft trees; a late tree costs only itself."""
    finetune_weight: float = 0.25
    min_finetune_share: float = 0.1
    finetune_sharing: str = "token"
    """token: finetuning shares every iteration. To compare with it, temporal:N: a whole mini-batch after N iterations of
    inference; dynamic: N by load.
    """
    max_iteration_ms: float = 250.0
    """Longest iteration while only requests without a TPOT target decode."""
    max_prefill_ms: float = 1000.0
    """Longest iteration that computes prompts while no request with a TPOT target decodes."""
    idle_iteration_ms: float = 120.0
    """Longest iteration of finetuning alone that a request has to wait for: of evaluations and distillation jobs, or any with
    `interruptible_ms` 0. Of what stops for requests, a unit of work takes half of it."""
    interruptible_ms: float = 2000.0
    """Longest iteration of finetuning alone that stops when anything comes in, between two units: a layer of some rows each."""
    max_recompute_share: float = 0.0
    """Part of a forward pass that finetuning may run again to hold less memory; `heddle explain memory` tells what it saves."""
    max_jobs: int = 4
    max_loras: int = 32
    """Adapters that are resident at once; others are loaded when they are asked for, in place of one that is not in use."""
    max_lora_rank: int = 256
    drain_grace_s: float = 20.0
    log_iterations: bool = True
    """One log line per iteration: its tokens by kind and its latency."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in (
            "page_size",
            "kv_cache_tokens",
            "max_model_len",
            "max_sequences",
            "max_batch_tokens",
            "max_jobs",
            "max_loras",
        ):
            require(getattr(self, field) > 0, field, "be positive")
        require(
            self.max_tree_nodes >= 0 and self.max_draft_tokens >= 0, "max_tree_nodes and max_draft_tokens", "not be negative"
        )
        require(self.max_graph_tokens >= 0, "max_graph_tokens", "not be negative")
        require(self.kv_cache_tokens >= self.page_size, "kv_cache_tokens", "be at least page_size")
        require(self.max_lora_rank > 0, "max_lora_rank", "be positive")
        require(1 <= self.cohorts <= MAX_COHORTS, "cohorts", f"be from 1 to {MAX_COHORTS}")
        require(self.idle_iteration_ms > 0, "idle_iteration_ms", "be positive")
        require(self.interruptible_ms >= 0, "interruptible_ms", "not be negative")
        require(self.tree_wait_ms >= 0, "tree_wait_ms", "not be negative")
        cores = os.cpu_count() or 1
        require(self.threads <= cores, "threads", f"not be more than this machine's {cores} cores")
        require(0 <= self.max_recompute_share <= 1, "max_recompute_share", "be in [0, 1]")
        require(0 <= self.min_finetune_share < 1, "min_finetune_share", "be in [0, 1)")
        try:
            parse_sharing(self.finetune_sharing)
        except ValueError as error:
            raise ConfigError(f"finetune_sharing {error}") from error
