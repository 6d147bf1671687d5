"""What a service tells its peers of itself each second: its state, and an executor's load and latency profile."""

from __future__ import annotations

from typing import Literal

import msgspec

Role = Literal["gateway", "admission", "planner", "executor", "trainer"]
ServiceState = Literal["starting", "ready", "draining"]


class LatencyProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Measured cost of an iteration: `points` are (tokens, ms), rising in both; see `common.latency`."""

    points: tuple[tuple[int, float], ...]
    ms_per_context_token: float = 0.0
    ms_per_row_context: float = 0.0
    """Of one row's attention to one token of its context; 0 in profiles of a time that did not measure it."""
    ms_per_scored_row: float = 0.0
    """Of the log probabilities after one row of a prompt: the model's head, and what is asked of its logits. 0 as above."""
    backward_ms_per_token: float = 0.0
    drafter_correction: float = 4.0
    """How much slower the training of a drafter's head is, per multiply-add, than the widest pass that was measured."""
    correction: float = 1.0
    seen: tuple[float, ...] = ()
    """How many passes corrected each point; empty: none."""


class ExecutorLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What admission needs to know of one executor."""

    model: str
    adapters: tuple[str, ...]
    max_model_len: int
    page_size: int
    num_pages: int
    free_pages: int
    num_running: int
    num_waiting: int
    waiting_prefill_tokens: int
    context_tokens: int
    promised_tpot_ms: tuple[float, ...]
    latency: LatencyProfile
    planner_id: str = ""
    """Who drafts for it."""
    max_training_tokens: int = 0
    """Longest training sequence that it takes; 0: unknown."""
    max_loras: int = 0
    """Adapters that can be resident; `adapters` are those that are, the one used longest ago first."""
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    """Of requests that decode, and of those before their first token."""
    cached_pages: bytes | None = None
    """Keys of the pages that a prompt may begin with (`common.prefix`), joined; None: each prompt is computed anew."""
    adapter_versions: tuple[int, ...] = ()
    """What the digests of pages computed with each of `adapters` begin with."""


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag="beat.1"):
    """A heartbeat. A peer is dead after three missed periods. `counters` only grow; `gauges` are the load of this moment."""

    role: Role
    instance_id: str
    state: ServiceState
    sent_at: float
    period_s: float
    url: str = ""
    counters: dict[str, float] = {}
    gauges: dict[str, float] = {}
    executor: ExecutorLoad | None = None


# --- speculation: executor <-> planner ---------------------------------------------------------------------------------
