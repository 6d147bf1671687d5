"""The fused iteration: plan, one forward pass over all rows, verify, commit. Knows tensors and sequences, not the bus.

One thread at a time may call it. `forward_pass` runs inference and training windows, `backward_pass` the finetuning work
that was planned into the same iteration; tokens can be sent between the two.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from common.latency import corrected
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
from services.executor.batch import Segment, build_batch
from services.executor.lora import LoraAdapter
from services.executor.model import Decoder, KvCache
from services.executor.pages import OutOfPagesError, PageAllocator
from services.executor.sampling import draw_tokens
from services.executor.scheduler import IterationPlan, Limits, plan_iteration
from services.executor.sequences import Sequence
from services.executor.training import Training, TrainingEvent
from services.executor.verify import InvalidTreeError, Verdict, accept, check_tree, depths, prune


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iteration:
    """What one iteration did: tokens by kind, and what to tell requesters and planner.

    `backward_tokens` are planned: whole-model equivalents that the same iteration goes back through.
    """

    number: int
    decode_tokens: int = 0
    draft_tokens: int = 0
    prefill_tokens: int = 0
    finetune_tokens: int = 0
    chunks: tuple[TokenChunk, ...] = ()
    backward_tokens: int = 0
    opened: tuple[OpenedSequence, ...] = ()
    progress: tuple[SequenceProgress, ...] = ()
    planned_ms: float = 0.0
    limit_ms: float = 0.0


@dataclasses.dataclass
class _Work:
    """One sequence's part of the pass."""

    sequence: Sequence
    segment: Segment
    is_decode: bool


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
        executor_id: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.decoder = decoder
        self.pages = PageAllocator(num_pages, page_size)
        self.cache = KvCache(decoder.config, num_pages * page_size, decoder.dtype, decoder.device)
        self.training = Training(decoder, self.cache, self.pages)
        self.profile = profile
        self.limits = limits
        self.max_model_len = min(max_model_len, decoder.config.max_position_embeddings, num_pages * page_size * 3 // 4)
        self.max_sequences = max_sequences
        self.max_tree_nodes = max_tree_nodes
        self.adapters: dict[str, LoraAdapter] = {}
        self.sequences: dict[str, Sequence] = {}
        self.counters: Counter[str] = Counter()
        self.num_iterations = 0
        self._executor_id = executor_id
        self._clock = clock
        self._plan: IterationPlan | None = None
        self._started_at = 0.0

    # --- work in ---------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether an iteration would do something."""
        return bool(self.sequences) or self.training.has_work

    def submit(self, request: InferenceRequest, adapter_name: str | None, first_token_due_at: float = 0.0) -> Rejected | None:
        """Take a request in, or say why not; nothing is kept of a refused one."""
        if request.request_id in self.sequences:
            return Rejected(reason="duplicate", message=f"request {request.request_id} is running already")
        if refusal := self._refusal(request, adapter_name):
            return refusal
        ends = () if request.ignore_eos else self.decoder.config.eos_token_ids
        self.sequences[request.request_id] = Sequence(
            request=request,
            tokens=list(request.prompt_tokens),
            table=self.pages.table(),
            adapter=self.adapters[adapter_name] if adapter_name else None,
            stop_ids=frozenset((*ends, *request.stop_token_ids)),
            first_token_due_at=first_token_due_at or None,
            num_output=request.num_generated,
        )
        self.counters["requests"] += 1
        return None

    def cancel(self, request_id: str) -> TokenChunk | None:
        """End a request now: its pages are free when this returns. None if it is not here."""
        sequence = self.sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, (), "cancelled")

    def set_trees(self, message: DraftTrees) -> None:
        """Attach draft trees to their sequences; a late, wrong or orphaned tree is counted and dropped."""
        for tree in message.trees:
            sequence = self.sequences.get(tree.request_id)
            if sequence is None or not sequence.is_decoding:
                self.counters["trees_orphaned"] += 1
                continue
            try:
                check_tree(tree, sequence.tokens, self.decoder.config.vocab_size, self.max_tree_nodes)
            except InvalidTreeError as error:
                self.counters["trees_late" if str(error).startswith("late") else "trees_invalid"] += 1
                continue
            sequence.tree = tree

    # --- one iteration ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward_pass(self) -> Iteration:
        """Plan the iteration and run its one fused forward pass."""
        self._started_at = self._clock()
        views = [sequence.view(self._started_at) for sequence in self.sequences.values()]
        plan = plan_iteration(self._started_at, views, self.training.views(), self.profile, self.limits)
        works = self._inference_work(plan)
        windows = self.training.windows(plan.forward)
        segments = [work.segment for work in works] + [window.segment for window in windows]
        self.num_iterations += 1
        self._plan = plan
        if not segments:
            return self._finish_iteration([], [], plan, 0)
        batch = build_batch(segments, self.decoder.device)
        hidden_TH = self.decoder.forward(batch, self.cache)
        for window, start in zip(windows, batch.starts[len(works) :], strict=True):
            self.training.head(window, hidden_TH[start : start + len(window.segment.tokens)])
        drawn = self._draw(works, self.decoder.logits(hidden_TH[batch.logit_rows]) if len(batch.logit_rows) else None)
        return self._finish_iteration(works, drawn, plan, sum(len(window.segment.tokens) for window in windows))

    @torch.inference_mode()
    def backward_pass(self) -> list[TrainingEvent]:
        """Run the backward work of the current iteration's plan, and optimizer steps that it completes."""
        return self.training.backward(self._plan.backward) if self._plan is not None else []

    def end_iteration(self) -> float:
        """Close the books of an iteration: returns its latency in ms, and corrects the latency model by it."""
        elapsed_ms = (self._clock() - self._started_at) * 1e3
        if self._plan is not None and self._plan.predicted_ms > 0:
            self.profile = corrected(self.profile, self._plan.predicted_ms, elapsed_ms)
        return elapsed_ms

    def release_all(self) -> list[TokenChunk]:
        """End every request with an error, for example when a pass failed."""
        return [self._finish(sequence, (), "error") for sequence in list(self.sequences.values())]

    # --- parts of an iteration -------------------------------------------------------------------------------------

    def _inference_work(self, plan: IterationPlan) -> list[_Work]:
        """Segments of all planned sequences, oldest first for pages, neighbours by adapter for launches."""
        works: list[_Work] = []
        for sequence in sorted(self.sequences.values(), key=_arrival):
            if sequence.request_id in plan.decode and sequence.is_decoding:
                segment = self._decode_segment(sequence, plan.decode[sequence.request_id])
            elif sequence.request_id in plan.prefill:
                segment = self._prefill_segment(sequence, plan.prefill[sequence.request_id])
            else:
                continue
            if segment is not None:
                works.append(_Work(sequence, segment, sequence.request_id in plan.decode))
        works = [work for work in works if work.sequence.table.pages]
        return sorted(works, key=lambda work: work.sequence.adapter.name if work.sequence.adapter else "")

    def _decode_segment(self, sequence: Sequence, num_nodes: int) -> Segment | None:
        tree = None if sequence.tree is None or num_nodes == 0 else prune(sequence.tree, num_nodes)
        length = len(sequence.tokens)
        if tree is not None and self.pages.missing(sequence.table, length + len(tree.tokens) - 1) > self.pages.num_free:
            tree = None
        sequence.tree = tree
        tokens = [sequence.tokens[-1]] if tree is None else list(tree.tokens)
        if not self._reserve(sequence, length + len(tokens) - 1):
            return None
        parents = None if tree is None else tree.parents
        return Segment(
            tokens=tokens,
            positions=[length - 1 + depth for depth in depths(tree.parents)] if tree else [length - 1],
            context_slots=sequence.table.slots(0, length - 1),
            slots=sequence.table.slots(length - 1, length - 1 + len(tokens)),
            adapter=sequence.adapter,
            parents=parents,
            wants_logits="all",
        )

    def _prefill_segment(self, sequence: Sequence, num_tokens: int) -> Segment | None:
        start = sequence.num_computed
        end = start + num_tokens
        if not self._reserve(sequence, end):
            return None
        return Segment(
            tokens=sequence.tokens[start:end],
            positions=range(start, end),
            context_slots=sequence.table.slots(0, start),
            slots=sequence.table.slots(start, end),
            adapter=sequence.adapter,
            wants_logits="last" if end == len(sequence.tokens) else "none",
        )

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for `num_tokens` tokens, taken from the youngest sequences if none are free; False if it must wait."""
        while True:
            try:
                self.pages.reserve(sequence.table, num_tokens)
            except OutOfPagesError:
                victim = max(
                    (s for s in self.sequences.values() if s.table.pages), key=lambda s: s.request.arrived_at, default=None
                )
                if victim is None or victim.request.arrived_at < sequence.request.arrived_at:
                    return False
                self._preempt(victim)
                if victim is sequence:
                    return False
            else:
                return True

    def _preempt(self, sequence: Sequence) -> None:
        self.pages.release(sequence.table)
        sequence.num_computed = 0
        sequence.tree = None
        self.counters["preemptions"] += 1

    def _draw(self, works: list[_Work], logits_RV: Tensor | None) -> list[list[int]]:
        """The target's tokens for every row that wanted logits, per work."""
        rows = [_logit_positions(work.segment) for work in works]
        samplings = [work.sequence.request.sampling for work, r in zip(works, rows, strict=True) for _ in r]
        positions = [position for r in rows for position in r]
        tokens = iter(draw_tokens(logits_RV, samplings, positions) if logits_RV is not None else ())
        return [[next(tokens) for _ in r] for r in rows]

    def _finish_iteration(
        self, works: list[_Work], drawn: list[list[int]], plan: IterationPlan, num_training: int
    ) -> Iteration:
        now = self._clock()
        moves: tuple[list[int], list[int]] = ([], [])
        chunks: list[TokenChunk] = []
        progress: list[SequenceProgress] = []
        counts: Counter[str] = Counter()
        for work, tokens in zip(works, drawn, strict=True):
            if work.is_decode:
                counts["decode"] += 1
                counts["draft"] += len(work.segment.tokens) - 1
                verdict = self._verify(work, tokens, moves)
            else:
                counts["prefill"] += len(work.segment.tokens)
                work.sequence.num_computed += len(work.segment.tokens)
                verdict = Verdict((), tuple(tokens))
            if verdict.tokens:
                chunk, step = self._commit(work, verdict, now)
                chunks.append(chunk)
                progress += [step] if work.is_decode else []
        if moves[0]:
            device = self.decoder.device
            self.cache.move(torch.tensor(moves[0], device=device), torch.tensor(moves[1], device=device))
        for kind in ("decode", "draft", "prefill"):
            self.counters[f"{kind}_tokens"] += counts[kind]
        self.counters["finetune_tokens"] += num_training
        self.counters["iterations"] += 1
        return Iteration(
            number=self.num_iterations,
            decode_tokens=counts["decode"],
            draft_tokens=counts["draft"],
            prefill_tokens=counts["prefill"],
            finetune_tokens=num_training,
            backward_tokens=sum(plan.backward.values()),
            chunks=tuple(chunks),
            opened=tuple(work.sequence.opened() for work in works if not work.is_decode and work.sequence.is_decoding),
            progress=tuple(progress),
            planned_ms=plan.predicted_ms,
            limit_ms=plan.limit_ms,
        )

    def _verify(self, work: _Work, drawn: list[int], moves: tuple[list[int], list[int]]) -> Verdict:
        """Accept a path of the tree and note which cache rows must move behind the root."""
        sequence, segment = work.sequence, work.segment
        verdict = accept(segment.tokens, segment.parents or (-1,), drawn)
        for place, node in enumerate(verdict.path, start=1):
            if place != node:
                moves[0].append(segment.slots[node])
                moves[1].append(segment.slots[place])
        sequence.num_computed += 1 + len(verdict.path)
        sequence.tree = None
        sequence.verify_steps += 1
        sequence.drafted_tokens += len(segment.tokens) - 1
        sequence.accepted_tokens += len(verdict.path)
        self.counters["accepted_tokens"] += len(verdict.path)
        if len(segment.tokens) > 1:
            self.counters["drafts"] += 1
        return verdict

    def _commit(self, work: _Work, verdict: Verdict, now: float) -> tuple[TokenChunk, SequenceProgress]:
        sequence = work.sequence
        before = len(sequence.tokens)
        reason = sequence.commit(verdict.tokens, now)
        tokens = tuple(sequence.tokens[before:])
        self.counters["generated_tokens"] += len(tokens)
        progress = SequenceProgress(
            request_id=sequence.request_id,
            tokens=tokens,
            num_drafted=len(work.segment.tokens) - 1 if work.is_decode else 0,
            accepted_len=len(verdict.path),
            num_output=sequence.num_output,
            decode_ms=sequence.decode_ms(now),
        )
        return self._finish(sequence, tokens, reason) if reason else self._chunk(sequence, tokens), progress

    def _chunk(self, sequence: Sequence, tokens: tuple[int, ...], reason: FinishReason | None = None) -> TokenChunk:
        sequence.next_seq += 1
        return TokenChunk(
            request_id=sequence.request_id,
            seq=sequence.next_seq - 1,
            tokens=tokens,
            finish_reason=reason,
            usage=sequence.usage(self._clock()) if reason else None,
            executor_id=self._executor_id,
        )

    def _finish(self, sequence: Sequence, tokens: tuple[int, ...], reason: FinishReason) -> TokenChunk:
        self.pages.release(sequence.table)
        del self.sequences[sequence.request_id]
        self.counters[f"finished_{reason}"] += 1
        return self._chunk(sequence, tokens, reason)

    def _refusal(self, request: InferenceRequest, adapter_name: str | None) -> Rejected | None:
        num_tokens = len(request.prompt_tokens)
        if adapter_name is not None and adapter_name not in self.adapters:
            return Rejected(reason="unknown_model", message=f"adapter {adapter_name} is not loaded here", retry_after_ms=1000)
        if num_tokens == 0 or request.max_tokens - request.num_generated < 1:
            return Rejected(reason="invalid", message="a request needs at least one prompt token and one output token")
        if num_tokens + request.max_tokens - request.num_generated > self.max_model_len:
            return Rejected(
                reason="too_long",
                message=f"{num_tokens} prompt and {request.max_tokens} output tokens exceed the limit of {self.max_model_len}",
            )
        vocab_size = self.decoder.config.vocab_size
        if any(not 0 <= token < vocab_size for token in request.prompt_tokens):
            return Rejected(reason="invalid", message=f"prompt tokens must be in 0..{vocab_size - 1}")
        if len(self.sequences) >= self.max_sequences:
            return Rejected(reason="overloaded", message=f"{self.max_sequences} requests are running", retry_after_ms=500)
        return None


def _arrival(sequence: Sequence) -> float:
    return sequence.request.arrived_at


def _logit_positions(segment: Segment) -> list[int]:
    """Absolute positions of the tokens to be drawn from this segment's logits."""
    following = [position + 1 for position in segment.positions]
    return {"all": following, "last": following[-1:], "none": []}[segment.wants_logits]
