"""What the gateway measures of its requests, under vLLM's names where vLLM has them. Knows answers, not the fleet."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram

from services.gateway.answer import Answer

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TPOT_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
E2E_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""The three are vLLM's, so that its dashboards fit."""


class Metrics:
    """One registry per gateway. The base model's series are there from the start, so that rates are right."""

    def __init__(self, model: str) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of ended requests.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Output tokens.")
        self._ended = self._counter("vllm:request_success", "Ended choices by finish reason.", "finished_reason")
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", TTFT_BUCKETS)
        self._gap = self._histogram("vllm:inter_token_latency_seconds", "Between the chunks of a choice.", TPOT_BUCKETS)
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", E2E_BUCKETS)
        self._tpot = self._histogram("heddle_request_tpot_seconds", "Mean time per output token of a request.", TPOT_BUCKETS)
        self._slo = self._counter("heddle_slo_requests", "Ended requests with a target.", "target", "attained")
        for metric in (self._prompt_tokens, self._generation_tokens, self._ttft, self._gap, self._e2e, self._tpot):
            metric.labels(model)

    def text(self) -> bytes:
        """The exposition."""
        return prometheus_client.generate_latest(self.registry)

    def observe_tokens(self, model: str, num_tokens: int, gap_s: float | None) -> None:
        """Tokens arrived, so long after the choice's last ones (None: its first)."""
        self._generation_tokens.labels(model).inc(num_tokens)
        if gap_s is not None:
            self._gap.labels(model).observe(gap_s)

    def observe(self, answer: Answer, now: float) -> None:
        """Count an answer that has ended, well or not."""
        model = answer.plan.model
        self._prompt_tokens.labels(model).inc(answer.plan.num_prompt_tokens)
        for choice in answer.choices:
            self._ended.labels(model, choice.finish_reason or ("abort" if _was_left(answer) else "error")).inc()
        if answer.ttft_ms is not None:
            self._ttft.labels(model).observe(answer.ttft_ms / 1000)
        if answer.tpot_ms is not None:
            self._tpot.labels(model).observe(answer.tpot_ms / 1000)
        self._e2e.labels(model).observe(now - answer.arrived_at)
        self._count_verdicts(answer)

    def _count_verdicts(self, answer: Answer) -> None:
        """A request that failed attained nothing; one that its client left says nothing."""
        if _was_left(answer):
            return
        slo = answer.plan.slo
        for target, limit, measured in (("tpot", slo.tpot_ms, answer.tpot_ms), ("ttft", slo.ttft_ms, answer.ttft_ms)):
            if limit is not None:
                is_met = answer.error is None and (measured is None or measured <= limit)
                self._slo.labels(answer.plan.model, target, str(is_met).lower()).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("model_name",), buckets=buckets, registry=self.registry)


def _was_left(answer: Answer) -> bool:
    """Whether its client went away, or cancelled it, before it ended."""
    if answer.error is not None:
        return answer.error.code == "cancelled"
    return not all(choice.finish_reason for choice in answer.choices)
