"""Heartbeats as metrics: executors' load under vLLM's names, every counter and gauge as heddle_<role>_<name>."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.fleet import Fleet
from common.messages import Beat, ExecutorLoad

THEIRS = {
    "prefix_cache_queries": "vllm:prefix_cache_queries",
    "prefix_cache_hits": "vllm:prefix_cache_hits",
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
}
"""Executors' counters that vLLM has under other names."""
ACCEPTED_AT = re.compile(r"accepted_tokens_at_(\d+)")
"""Executors' counters of draft tokens accepted at one position of the path."""


class FleetCollector(Collector):
    """Reads the fleet at each scrape; instances that died disappear."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        """All families of all living instances."""
        beats = self._fleet.alive(None, time.monotonic())
        executors = [(beat, beat.executor) for beat in beats if beat.executor is not None]
        yield from _load_families(executors)
        yield from _counter_families(executors)
        yield from _own_families(beats)


def _load_families(executors: list[tuple[Beat, ExecutorLoad]]) -> Iterator[Metric]:
    labels = ("model_name", "engine")
    running = GaugeMetricFamily("vllm:num_requests_running", "Requests that decode.", labels=labels)
    waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait for their first token.", labels=labels)
    cache = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", labels=labels)
    loras = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "When an executor last told of its adapters: those of requests that run and wait, and how many can be resident.",
        labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters", "engine"),
    )
    for beat, load in executors:
        adapters = (",".join(load.waiting_adapters), ",".join(load.running_adapters))
        if load.max_loras:
            loras.add_metric((str(load.max_loras), *adapters, beat.instance_id), beat.sent_at)
        where = (load.model, beat.instance_id)
        running.add_metric(where, load.num_running)
        waiting.add_metric(where, load.num_waiting)
        cache.add_metric(where, 1 - load.free_pages / load.num_pages if load.num_pages else 0.0)
    yield from (running, waiting, cache, loras)


def _counter_families(executors: list[tuple[Beat, ExecutorLoad]]) -> Iterator[Metric]:
    labels = ("model_name", "engine")
    families = {name: CounterMetricFamily(theirs, "As in vLLM.", labels=labels) for name, theirs in THEIRS.items()}
    per_position = CounterMetricFamily(
        "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted draft tokens by depth.", labels=(*labels, "position")
    )
    for beat, load in executors:
        for name, family in families.items():
            family.add_metric((load.model, beat.instance_id), beat.counters.get(name, 0.0))
        for name, value in beat.counters.items():
            if match := ACCEPTED_AT.fullmatch(name):
                per_position.add_metric((load.model, beat.instance_id, match[1]), value)
    yield from (*families.values(), per_position)


def _own_families(beats: list[Beat]) -> Iterator[Metric]:
    families: dict[str, Metric] = {}
    for beat in beats:
        for name, value in beat.counters.items():
            key = _metric_name(beat.role, name.removesuffix("_total"))
            counter = families.setdefault(key, CounterMetricFamily(key, f"Of {beat.role}s.", labels=("instance",)))
            if isinstance(counter, CounterMetricFamily):
                counter.add_metric((beat.instance_id,), value)
        for name, value in beat.gauges.items():
            key = _metric_name(beat.role, name)
            gauge = families.setdefault(key, GaugeMetricFamily(key, f"Of {beat.role}s.", labels=("instance",)))
            if isinstance(gauge, GaugeMetricFamily):
                gauge.add_metric((beat.instance_id,), value)
    yield from families.values()


def _metric_name(role: str, name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", f"heddle_{role}_{name}")
