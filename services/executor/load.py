"""What an executor tells the fleet about its load. Knows the engine's counts, not the bus."""

from __future__ import annotations

from common.messages import ExecutorLoad
from common.prefix import MAX_TOLD_PAGES, page_key
from common.service import Vitals
from services.executor.engine import Engine
from services.executor.sequences import Sequence


def executor_vitals(
    engine: Engine,
    *,
    model: str,
    planner_id: str,
    draining: bool,
    max_loras: int,
    pages: bytes | None,
    gauges: dict[str, float],
) -> Vitals:
    """The vitals of this moment, with the `cached_pages` of one; call it while no pass runs."""
    load = executor_load(engine, model, planner_id, max_loras, pages)
    own = {
        "num_running": load.num_running,
        "num_waiting": load.num_waiting,
        "free_pages": load.free_pages,
        "pages_in_use": engine.pages.num_pages - engine.pages.num_free,
        "pages_cached": engine.pages.num_cached,
        "pages_allocated": engine.pages.num_allocated,
        "pages_freed": engine.pages.num_freed,
        "jobs": engine.training.num_jobs,
    }
    return Vitals(
        state="draining" if draining else "ready",
        counters={name: float(count) for name, count in dict(engine.counters).items()},
        gauges=gauges | {name: float(value) for name, value in own.items()},
        executor=load,
    )


def cached_pages(engine: Engine) -> bytes | None:
    """Keys of the pages that a prompt may begin with; some tenths of a millisecond, so not for each iteration."""
    return b"".join(map(page_key, engine.pages.published(MAX_TOLD_PAGES))) if engine.has_prefix_cache else None


def executor_load(engine: Engine, model: str, planner_id: str, max_loras: int = 0, pages: bytes | None = None) -> ExecutorLoad:
    """What admission needs to choose an executor."""
    sequences = list(engine.sequences.values())
    decoding = [sequence for sequence in sequences if sequence.is_decoding]
    waiting = [sequence for sequence in sequences if not sequence.is_decoding]
    return ExecutorLoad(
        model=model,
        adapters=tuple(engine.adapters),
        max_model_len=engine.max_model_len,
        page_size=engine.pages.page_size,
        num_pages=engine.pages.num_pages,
        free_pages=engine.pages.num_free,
        num_running=len(decoding),
        num_waiting=len(waiting),
        waiting_prefill_tokens=sum(sequence.num_uncomputed for sequence in waiting),
        context_tokens=sum(sequence.num_computed for sequence in decoding),
        promised_tpot_ms=tuple(s.request.slo.tpot_ms for s in sequences if s.request.slo.tpot_ms is not None),
        latency=engine.profile,
        planner_id=planner_id,
        max_training_tokens=engine.training.max_tokens,
        max_loras=max_loras,
        running_adapters=_names(decoding),
        waiting_adapters=_names(waiting),
        cached_pages=pages,
        adapter_versions=tuple(adapter.version for adapter in engine.adapters.values()),
    )


def _names(sequences: list[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({sequence.adapter.name for sequence in sequences if sequence.adapter is not None}))
