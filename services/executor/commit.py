"""What the tokens drawn in a pass do to one sequence: accepted path, rows to move, progress. Knows no tensors and no bus."""

from __future__ import annotations

import dataclasses
from collections import Counter

from common.messages import FinishReason, SequenceProgress
from services.executor.assembly import Work
from services.executor.verify import Drawn, Verdict, accept


@dataclasses.dataclass
class Moves:
    """Cache rows to copy after a pass: accepted nodes go behind their root."""

    sources: list[int] = dataclasses.field(default_factory=list)
    targets: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Committed:
    """What a sequence has more than before; with a reason it has ended."""

    tokens: tuple[int, ...]
    reason: FinishReason | None
    progress: SequenceProgress


def verify(work: Work, drawn: Drawn, moves: Moves, counters: Counter[str]) -> Verdict:
    """Accept a path of the tree and note which cache rows must move behind the root."""
    sequence, segment = work.sequence, work.segment
    verdict = accept(segment.tokens, segment.parents or (-1,), drawn)
    for place, node in enumerate(verdict.path, start=1):
        if place != node:
            moves.sources.append(segment.slots[node])
            moves.targets.append(segment.slots[place])
    sequence.num_computed += 1 + len(verdict.path)
    sequence.tree = None
    sequence.verify_steps += 1
    sequence.drafted_tokens += len(segment.tokens) - 1
    if len(segment.tokens) > 1:
        counters["drafts"] += 1
    return verdict


def commit(work: Work, verdict: Verdict, now: float, counters: Counter[str], features: bytes = b"") -> Committed:
    """Append the verdict's tokens, up to the one that ends the request; `features` are of the rows that they followed."""
    sequence = work.sequence
    before = len(sequence.tokens)
    if sequence.first_token_at is None and sequence.digests is not None:
        counters["prefix_cache_queries"] += before
        counters["prefix_cache_hits"] += sequence.num_cached
    reason = sequence.commit(verdict.tokens, now)
    tokens = tuple(sequence.tokens[before:])
    accepted_len = min(len(verdict.path), len(tokens))
    sequence.accepted_tokens += accepted_len
    counters["accepted_tokens"] += accepted_len
    counters.update(f"accepted_tokens_at_{i}" for i in range(accepted_len))
    counters["generated_tokens"] += len(tokens)
    progress = SequenceProgress(
        request_id=sequence.request_id,
        tokens=tokens,
        num_drafted=len(work.segment.tokens) - 1 if work.is_decode else 0,
        accepted_len=accepted_len,
        num_output=sequence.num_output,
        decode_ms=sequence.decode_ms(now),
        features=features[: len(features) // len(verdict.tokens) * len(tokens)],
    )
    return Committed(tokens, reason, progress)
