"""Which executor takes a request, if any: predicted latencies against targets. Pure; `now` is an argument, the bus unknown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from common.latency import Rows, max_rows, predict_ms
from common.messages import Beat, ExecutorLoad, InferenceRequest, Rejected

NO_EXECUTOR_RETRY_MS = 1000
"""Executors report once a second, so that nobody learns of a new one earlier."""
PACE = 0.9
"""Share of a promised time per token that executors plan an iteration for."""
LEAST_CHUNK = 2
"""Tokens per iteration that they compute of a prompt when promises leave no room: a page every ninth iteration."""
MIN_RETRY_MS = 100
MAX_RETRY_MS = 60_000
NOTHING_CACHED: Mapping[str, int] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a queue may become, and how prompts are cut; see AdmissionConfig."""

    prefill_chunk: int
    max_backlog_ms: float
    max_waiting: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the request goes; with `best_effort` a target (its own or one promised there) will probably be missed.

    `attainable`: its own will probably be met.
    """

    executor_id: str
    best_effort: bool
    attainable: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """What would happen to the request on one executor, and to the requests that run there."""

    executor_id: str
    backlog_ms: float
    ttft_ms: float
    work_ms: float
    """Of this prompt alone: others wait for it too."""
    tpot_ms: float
    excess: float
    """By how much the targets of the request are missed, relative to them; 0 if they are met."""
    num_broken: int
    """Promised TPOTs that hold now and would not with this request."""
    has_pages: bool
    num_ahead: int
    num_waiting: int
    is_resident: bool = True
    """The request's adapter need not be loaded first."""

    @property
    def keeps_promises(self) -> bool:
        """Whether every target is met."""
        return self.excess == 0 and self.num_broken == 0 and self.has_pages

    def cost(self) -> tuple[float, bool, float, float, int, str]:
        """Orders forecasts, best first: missed targets, then an adapter to load, then the wait, then the load.

        The prompt's own time counts twice, as its wait and as everyone else's: between executors that keep all targets, the one
        that has the prompt's beginning may have the longer queue, by as much as it saves.
        """
        missed = self.excess + self.num_broken + (0 if self.has_pages else 1)
        return missed, not self.is_resident, self.ttft_ms + self.work_ms, self.tpot_ms, self.num_ahead, self.executor_id


def admit(
    request: InferenceRequest,
    executors: Sequence[Beat],
    now: float,
    limits: Limits,
    excluded: Collection[str] = (),
    cached: Mapping[str, int] = NOTHING_CACHED,
) -> Placement | Rejected:
    """Place the request on the executor that serves it best, as best effort if need be, or say why none takes it.

    `executors` are the last beats of the living executors, whatever their state; `excluded` ones have refused the request.
    `cached` are the tokens of its prompt that they need not compute.
    """
    if fault := find_fault(request):
        return Rejected(reason="invalid", message=fault)
    serving = [beat for beat in executors if serves(beat, request)]
    ready = [beat for beat in serving if beat.state == "ready" and beat.instance_id not in excluded]
    if not ready:
        return _nobody(request, executors, bool(serving))
    roomy = [beat for beat in ready if beat.executor is not None and has_room(request, beat.executor)]
    if not roomy:
        return _too_long(request, ready)
    forecasts = [
        forecast(request, beat.instance_id, beat.executor, now, limits, cached.get(beat.instance_id, 0))
        for beat in roomy
        if beat.executor
    ]
    best = min(forecasts, key=Forecast.cost)
    if best.keeps_promises:
        return Placement(executor_id=best.executor_id, best_effort=False)
    short = [each for each in forecasts if each.backlog_ms <= limits.max_backlog_ms and each.num_waiting < limits.max_waiting]
    if not short:
        return _overloaded(forecasts)
    chosen = min(short, key=Forecast.cost)
    attainable = chosen.excess == 0 and (chosen.has_pages or request.slo.ttft_ms is None)  # pages come nobody knows when
    return Placement(executor_id=chosen.executor_id, best_effort=True, attainable=attainable)


def find_fault(request: InferenceRequest) -> str | None:
    """Why no executor could ever run the request, or None."""
    if not request.prompt_tokens:
        return "the prompt is empty"
    if request.max_tokens < 1:
        return f"max_tokens must be at least 1, got {request.max_tokens}"
    if request.num_generated >= request.max_tokens:
        return f"all {request.max_tokens} tokens were generated already"
    for name, target in (("tpot_ms", request.slo.tpot_ms), ("ttft_ms", request.slo.ttft_ms)):
        if target is not None and not (math.isfinite(target) and target > 0):
            return f"slo.{name} must be a positive number, got {target}"
    return None


def serves(beat: Beat, request: InferenceRequest) -> bool:
    """Whether this instance answers to the request's model; adapters of its base model it loads when they are asked for."""
    load = beat.executor
    return load is not None and ((request.base_model or request.model) == load.model or request.model in load.adapters)


def has_room(request: InferenceRequest, load: ExecutorLoad) -> bool:
    """Whether the prompt and one token fit into the model's window, and into the pages of an idle executor."""
    num_tokens = len(request.prompt_tokens) + 1
    return num_tokens <= load.max_model_len and num_tokens <= load.num_pages * load.page_size


def forecast(
    request: InferenceRequest, executor_id: str, load: ExecutorLoad, now: float, limits: Limits, cached_tokens: int = 0
) -> Forecast:
    """Predicted TTFT (the prompts ahead and what of this one is not cached, in chunks) and TPOT (one more root per iteration)
    on one executor.

    Speculation is left out: it helps, but a promise must hold for text that nobody can draft.
    """
    num_ahead = load.num_running + load.num_waiting
    context = load.context_tokens + load.waiting_prefill_tokens
    roots = Rows(num_ahead, context, context)
    tpot_before_ms = predict_ms(load.latency, roots)
    tpot_ms = predict_ms(load.latency, roots.with_segment(1, len(request.prompt_tokens)))
    waited_ms = 1000 * max(0.0, now - request.arrived_at) if request.arrived_at else 0.0
    ahead = prompts_ahead(load)
    num_tokens = len(request.prompt_tokens)
    chunk = chunk_tokens(load, limits.prefill_chunk, context=(cached_tokens + num_tokens) // 2)
    own = num_tokens - cached_tokens
    own_scored = 0 if request.prompt_logprobs is None else num_tokens - 1
    ttft_ms = waited_ms + prefill_ms(load, [*ahead, own], chunk, cached_tokens, own_scored)
    return Forecast(
        executor_id=executor_id,
        backlog_ms=prefill_ms(load, ahead, limits.prefill_chunk),  # a queue is too long by its work, not by who is polite
        ttft_ms=ttft_ms,
        work_ms=prefill_ms(load, [own], chunk, cached_tokens, own_scored),
        tpot_ms=tpot_ms,
        excess=_excess(ttft_ms, request.slo.ttft_ms) + _excess(tpot_ms, request.slo.tpot_ms),
        num_broken=sum(tpot_before_ms <= promised < tpot_ms for promised in load.promised_tpot_ms),
        has_pages=-(-(num_tokens + 1) // load.page_size) <= load.free_pages,
        num_ahead=num_ahead,
        num_waiting=load.num_waiting,
        is_resident=request.model in (load.model, *load.adapters),
    )


def prompts_ahead(load: ExecutorLoad) -> list[int]:
    """Lengths of the waiting prompts, as if they were equal: an executor tells their sum and number."""
    num_prompts = max(1, load.num_waiting)
    shortest, longer = divmod(load.waiting_prefill_tokens, num_prompts)
    return [shortest + (i < longer) for i in range(num_prompts)]


def chunk_tokens(load: ExecutorLoad, largest: int, context: int) -> int:
    """Prompt tokens that an executor computes in one iteration behind this context: what the tightest promise that can be kept
    leaves room for, up to `largest`.
    """
    roots = Rows(load.num_running, load.context_tokens, load.context_tokens)
    alone_ms = predict_ms(load.latency, roots)
    kept = [promised for promised in load.promised_tpot_ms if promised >= alone_ms]
    if not kept:
        return largest
    return max(min(LEAST_CHUNK, largest), max_rows(load.latency, PACE * min(kept), largest, roots, context))


def prefill_ms(load: ExecutorLoad, prompts: Sequence[int], chunk: int, cached_tokens: int = 0, scored: int = 0) -> float:
    """How long prompts of these lengths take in chunks, each behind its context, beside the running requests' roots.

    The last one goes on behind so many tokens that are cached, and the log probabilities of so many of its own are wanted.
    """
    roots = Rows(load.num_running, load.context_tokens, load.context_tokens)
    num_full, rest = divmod(sum(prompts), chunk)
    full_ms = predict_ms(load.latency, roots.widened(chunk, 0))
    rest_ms = predict_ms(load.latency, roots.widened(rest, 0)) if rest else 0.0
    contexts = [_chunk_contexts(length, chunk) for length in prompts]
    contexts.append((cached_tokens * -(-prompts[-1] // chunk), cached_tokens * prompts[-1]))
    behind = Rows(1, sum(context for context, _ in contexts), sum(row_context for _, row_context in contexts), scored)
    return num_full * full_ms + rest_ms + predict_ms(load.latency, behind) - predict_ms(load.latency, Rows(1))


def _chunk_contexts(length: int, chunk: int) -> tuple[int, int]:
    """Sums over a prompt's chunks of what each is behind, and of that times its rows."""
    num_full, rest = divmod(length, chunk)
    context = chunk * num_full * (num_full - 1) // 2
    return context + (num_full * chunk if rest else 0), chunk * context + rest * num_full * chunk


def _excess(predicted_ms: float, target_ms: float | None) -> float:
    return 0.0 if target_ms is None else max(0.0, predicted_ms / target_ms - 1.0)


def _nobody(request: InferenceRequest, executors: Sequence[Beat], is_served: bool) -> Rejected:
    if not is_served and any(beat.state == "ready" for beat in executors):
        return Rejected(reason="unknown_model", message=f"no executor serves the model {request.model!r}")
    return Rejected(reason="no_executor", message="no executor is ready", retry_after_ms=NO_EXECUTOR_RETRY_MS)


def _too_long(request: InferenceRequest, ready: Sequence[Beat]) -> Rejected:
    loads = [beat.executor for beat in ready if beat.executor]
    longest = max(min(load.max_model_len, load.num_pages * load.page_size) for load in loads) - 1
    return Rejected(
        reason="too_long", message=f"the prompt has {len(request.prompt_tokens)} tokens, the limit of this model is {longest}"
    )


def _overloaded(forecasts: Sequence[Forecast]) -> Rejected:
    wait_ms = min(each.backlog_ms for each in forecasts)
    retry_after_ms = math.ceil(min(MAX_RETRY_MS, max(MIN_RETRY_MS, wait_ms)))
    return Rejected(
        reason="overloaded", message=f"prompts ahead take about {wait_ms / 1000:.1f} s", retry_after_ms=retry_after_ms
    )
