"""The fused iteration: plan, one forward pass over all rows, verify, commit. Knows tensors and sequences, not the bus.

One thread at a time may call it. `forward_pass` runs inference and training windows, `backward_pass` the finetuning work
that was planned into the same iteration; tokens can be sent between the two.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import structlog
import torch

from common.latency import corrected, predict_ms
from common.messages import (
    DraftTrees,
    FinishReason,
    InferenceRequest,
    LatencyProfile,
    OpenedSequence,
    Rejected,
    SequenceProgress,
    TokenChunk,
)
from common.sharing import TOKEN, Sharing
from kernels.upload import upload
from services.executor.assembly import Assembly, Work, decode_rows
from services.executor.cohorts import Cohorts
from services.executor.commit import Moves, commit, verify
from services.executor.device import MIN_BATCH_TOKENS, is_out_of_memory, wait_for
from services.executor.draws import WorkDraws, drawn_by
from services.executor.features import FeatureWish, PassFeatures
from services.executor.grammar import GrammarError, GrammarState
from services.executor.lora import LoraAdapter
from services.executor.model import Decoder, KvCache
from services.executor.pages import PageAllocator
from services.executor.passes import Passes
from services.executor.requests import refusal
from services.executor.sampling import Draws, NonFiniteLogitsError
from services.executor.scheduler import IterationPlan
from services.executor.sequences import Sequence, new_sequence
from services.executor.sharing import Turns, plan_turn
from services.executor.training import Training
from services.executor.training_work import BackwardWork, layers_of
from services.executor.trees import TreeLimits, attach
from services.executor.verify import Verdict
from services.executor.views import Limits

log = structlog.get_logger()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iteration:
    """What one iteration did: tokens by kind, and what to tell requesters and planner."""

    number: int
    decode_tokens: int = 0
    draft_tokens: int = 0
    prefill_tokens: int = 0
    finetune_tokens: int = 0
    chunks: tuple[TokenChunk, ...] = ()
    opened: tuple[OpenedSequence, ...] = ()
    progress: tuple[SequenceProgress, ...] = ()
    planned_ms: float = 0.0
    limit_ms: float = 0.0
    decode_ms: float = 0.0
    """Predicted of a pass with its roots and draft nodes alone."""


class Engine:
    """Sequences, pages, adapters and the model. `counters` only grow."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_pages: int,
        page_size: int,
        profile: LatencyProfile,
        limits: Limits,
        max_model_len: int,
        max_sequences: int,
        max_tree_nodes: int,
        max_draft_tokens: int,
        prefix_cache: bool = True,
        max_graph_tokens: int = 0,
        sharing: Sharing = TOKEN,
        num_cohorts: int = 1,
        executor_id: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.decoder = decoder
        self.cache = KvCache(decoder.config, num_pages * page_size, decoder.dtype, decoder.device)
        self.passes = Passes(decoder, self.cache, max_graph_tokens)
        self.pages = PageAllocator(num_pages, page_size)
        self.training = Training(decoder, self.cache, self.pages, clock)
        self._assembly = Assembly(self.pages)
        self.profile = profile
        self.limits = limits
        self.max_model_len = min(max_model_len, decoder.config.max_position_embeddings, num_pages * page_size * 3 // 4)
        self.max_sequences = max_sequences
        self.max_tree_nodes = max_tree_nodes
        self.max_draft_tokens = max_draft_tokens
        self.adapters: dict[str, LoraAdapter] = {}
        """Those that are resident, the one used longest ago first."""
        self.sequences: dict[str, Sequence] = {}
        self.counters: Counter[str] = Counter()
        self.feature_wish = FeatureWish()
        """The hidden states that the planner wants."""
        self.num_iterations = 0
        self.cohorts = Cohorts(num_cohorts)
        self.has_prefix_cache = prefix_cache
        self._executor_id = executor_id
        self._clock = clock
        self._plan: IterationPlan | None = None
        self._turns = Turns(sharing)
        self._finetuned = {"finetune_tokens": 0.0, "backward_tokens": 0.0}
        """Counters in parts of tokens: units do a layer of one."""
        self.has_news: Callable[[], bool] = lambda: False
        """Whether something came in that finetuning, where it has the device to itself, is to stop for; asked between units."""

    # --- work in ---------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether an iteration would do something."""
        return bool(self.sequences) or self.training.has_work

    def submit(
        self,
        request: InferenceRequest,
        adapter_name: str | None,
        first_token_due_at: float = 0.0,
        grammar: GrammarState | None = None,
    ) -> Rejected | None:
        """Take a request in, or say why not; nothing is kept of a refused one. `grammar` is its constraint, compiled."""
        assert (grammar is None) == (request.constraint is None)
        if request.request_id in self.sequences:
            return Rejected(reason="duplicate", message=f"request {request.request_id} is running already")
        if adapter_name is not None and adapter_name not in self.adapters:
            return Rejected(reason="unknown_model", message=f"adapter {adapter_name} is not loaded here", retry_after_ms=1000)
        if refused := refusal(request, self.decoder.config.vocab_size, self.max_model_len):
            return refused
        if len(self.sequences) >= self.max_sequences:
            return Rejected(reason="overloaded", message=f"{self.max_sequences} requests are running", retry_after_ms=500)
        adapter = None if adapter_name is None else self.adapters.pop(adapter_name)
        if adapter_name is not None and adapter is not None:
            self.adapters[adapter_name] = adapter  # the last of them is the one used last
        due_at, has_cache = first_token_due_at or None, self.has_prefix_cache
        self.sequences[request.request_id] = new_sequence(
            request, self.decoder.config, self.pages, adapter, grammar, first_token_due_at=due_at, has_prefix_cache=has_cache
        )
        self.counters["requests"] += 1
        return None

    def cancel(self, request_id: str, error: str | None = None) -> TokenChunk | None:
        """End a request now: its pages are free when this returns. None if it is not here.

        `error` says why, if it was not its requester who asked for it.
        """
        sequence = self.sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, (), "cancelled", error=error)

    def set_trees(self, message: DraftTrees) -> None:
        """Attach draft trees to their sequences; what is late, wrong, orphaned or over budget is counted and dropped."""
        config = self.decoder.config
        limits = TreeLimits(
            vocab_size=config.vocab_size,
            max_length=config.max_position_embeddings,
            max_nodes=self.max_tree_nodes,
            max_total=self.max_draft_tokens,
        )
        attach(message, self.sequences, limits, self.counters)

    # --- one iteration ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward_pass(self) -> Iteration:
        """Plan the iteration and run its one fused forward pass."""
        now = self._clock()
        views = [sequence.view(now) for sequence in self._assembly.runnable(self.sequences.values())]
        views = self.cohorts.take_turns(views, self.num_iterations + 1)
        plan, self._turns = plan_turn(now, views, self.training.views(), self.profile, self.limits, self._turns)
        self.cohorts.decoded(plan.decode, self.num_iterations + 1)
        works = self._assembly.work(plan, self.sequences.values())
        windows = self.training.windows(plan.forward)
        segments = [work.segment for work in works] + [window.segment for window in windows]
        self.num_iterations += 1
        self._plan = plan
        if plan.unit is not None and windows:
            self.training.start_units(windows)
            self._plan, segments = dataclasses.replace(plan, backward={**plan.backward, **plan.forward}), []
        if not segments:
            return self._finish_iteration([], [], plan, 0, PassFeatures(FeatureWish()))
        started_at = time.perf_counter()
        num_training = sum(len(window.segment.tokens) for window in windows)
        try:
            features = PassFeatures(self.feature_wish, layers_of(windows))
            ran = self.passes.run(segments, features)
            features.gather(ran.starts, [len(each.segment.tokens) for each in works], [each.is_decode for each in works])
            self.training.heads(windows, ran.hidden_TH, features)
            draws = None if ran.logits_RV is None else Draws(ran.logits_RV)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not self._shrink(plan.num_tokens):
                raise
            return self._finish_iteration([], [], plan, 0, PassFeatures(FeatureWish()))
        drawn = drawn_by(works, draws, ran.starts, ran.hidden_TH, self.decoder.logits)
        drawn_at = time.perf_counter()
        iteration = self._finish_iteration(works, drawn, plan, num_training, features)
        self.counters["verify_ms"] += (drawn_at - started_at) * 1e3  # type: ignore[assignment]
        self.counters["commit_ms"] += (time.perf_counter() - drawn_at) * 1e3  # type: ignore[assignment]
        self.counters["graph_replays"] += ran.is_replay
        wait_for(self.decoder.device)
        if len(ran.hidden_TH) == plan.num_tokens:  # else pages were short, and the prediction was for another pass
            self.profile = corrected(self.profile, plan.rows, (self._clock() - now) * 1e3)
        return iteration

    @torch.inference_mode()
    def backward_pass(self) -> BackwardWork:
        """Run the plan's backward work and the optimizer steps that it completes; tells of these and of failed jobs."""
        plan, self._plan = self._plan, None
        if plan is None:
            return BackwardWork()
        started_at = self._clock()
        work = self.training.backward(plan.backward, *(() if plan.unit is None else (plan.unit, self._is_awaited)))
        if work.units.num_lacking:
            self._shrink(work.units.num_lacking)
        wait_for(self.decoder.device)
        self.profile = work.learned(self.profile, (self._clock() - started_at) * 1e3)
        self._count_finetuned("finetune_tokens", work.units.num_tokens)
        self._count_finetuned("backward_tokens", work.num_tokens)
        return work

    def _is_awaited(self) -> bool:
        """Whether finetuning that goes in units is to stop; the device has done by then what it was given."""
        wait_for(self.decoder.device)
        return bool(self.sequences) or self.has_news()

    def _count_finetuned(self, kind: str, num_tokens: float) -> None:
        self._finetuned[kind] += num_tokens
        self.counters[kind] = round(self._finetuned[kind])

    def release_all(self, error: str) -> list[TokenChunk]:
        """End every request with an error, for example when a pass failed: then no cached page can be relied on either."""
        self.pages.forget_all()
        return [self._finish(sequence, (), "error", error=error) for sequence in list(self.sequences.values())]

    def _shrink(self, num_tokens: int) -> bool:
        """A pass of that many rows ran out of memory, which changed no request: make the next ones half as large, for good.

        False if they cannot be made smaller.
        """
        smaller = max(MIN_BATCH_TOKENS, num_tokens // 2)
        if smaller >= min(num_tokens, self.limits.max_batch_tokens):
            return False
        self.limits = dataclasses.replace(self.limits, max_batch_tokens=smaller)
        self.counters["passes_out_of_memory"] += 1
        log.warning("pass.out_of_memory", rows=num_tokens, max_batch_tokens=smaller)
        return True

    # --- parts of an iteration -------------------------------------------------------------------------------------

    def _finish_iteration(
        self, works: list[Work], drawn_by_work: list[WorkDraws], plan: IterationPlan, num_training: int, features: PassFeatures
    ) -> Iteration:
        now = self._clock()
        moves = Moves()
        chunks: list[TokenChunk] = []
        progress: list[SequenceProgress] = []
        counts: Counter[str] = Counter()
        for i, (work, drawn) in enumerate(zip(works, drawn_by_work, strict=True)):
            if work.is_decode:
                counts["decode"] += 1
                counts["draft"] += len(work.segment.tokens) - 1
            else:
                counts["prefill"] += len(work.segment.tokens)
                work.sequence.num_computed += len(work.segment.tokens)
            try:
                chunks += [self._chunk(work.sequence, (), prompt_logprobs=scores) for scores in drawn.prompt_logprobs()]
                verdict = verify(work, drawn, moves, self.counters) if work.is_decode else Verdict((), tuple(drawn))
            except (NonFiniteLogitsError, GrammarError) as error:
                chunks.append(self._finish(work.sequence, (), "error", error=str(error)))
                continue
            nodes = (0, *verdict.path) if work.is_decode else None
            work.sequence.features = features.take(i, work.sequence.features, work.sequence.num_computed, nodes)
            if verdict.tokens:
                done = commit(work, verdict, now, self.counters, features.of(i, nodes) if nodes else b"")
                finish = self._finish if done.reason else self._chunk
                chunks.append(
                    finish(work.sequence, done.tokens, done.reason, logprobs=drawn.logprobs(verdict.path, done.tokens))
                )
                progress += [done.progress] if work.is_decode else []
        if moves.sources:
            self.cache.move(*upload([np.array(moves.sources), np.array(moves.targets)], self.decoder.device))
        for kind in ("decode", "draft", "prefill"):
            self.counters[f"{kind}_tokens"] += counts[kind]
        self._count_finetuned("finetune_tokens", num_training)
        self.counters["iterations"] += 1
        self.counters["preemptions"] = self._assembly.num_preemptions
        return Iteration(
            number=self.num_iterations,
            decode_tokens=counts["decode"],
            draft_tokens=counts["draft"],
            prefill_tokens=counts["prefill"],
            finetune_tokens=num_training,
            chunks=tuple(chunks),
            opened=tuple(work.sequence.opened() for work in works if self._starts_to_decode(work)),
            progress=tuple(progress),
            planned_ms=plan.predicted_ms,
            limit_ms=plan.limit_ms,
            decode_ms=predict_ms(self.profile, decode_rows(works)),
        )

    def _starts_to_decode(self, work: Work) -> bool:
        is_running = work.sequence.request_id in self.sequences
        return is_running and not work.is_decode and work.sequence.is_decoding

    def _chunk(
        self, sequence: Sequence, tokens: tuple[int, ...], reason: FinishReason | None = None, **fields: Any
    ) -> TokenChunk:
        sequence.next_seq += 1
        return TokenChunk(
            request_id=sequence.request_id,
            seq=sequence.next_seq - 1,
            tokens=tokens,
            finish_reason=reason,
            usage=sequence.usage(self._clock()) if tokens or reason else None,
            executor_id=self._executor_id,
            **fields,
        )

    def _finish(self, sequence: Sequence, tokens: tuple[int, ...], reason: FinishReason | None, **fields: Any) -> TokenChunk:
        if reason != "error":  # what made it fail may be in its pages
            sequence.publish(self.pages)
        self.pages.release(sequence.table, is_sound=reason != "error")
        del self.sequences[sequence.request_id]
        self.counters[f"finished_{reason}"] += 1
        return self._chunk(sequence, tokens, reason, **fields)
