"""What an executor and its planner say to each other: reports of iterations, and draft trees."""

from __future__ import annotations

import math

import msgspec

from common.messages.beats import LatencyProfile


class PlannerClaim(msgspec.Struct, frozen=True, kw_only=True, tag="claim.1"):
    """An executor asks who drafts for it."""

    executor_id: str
    model: str
    fingerprint: str = ""
    """Of the base model; see `common.fingerprint`."""


class PlannerGranted(msgspec.Struct, frozen=True, kw_only=True, tag="granted.1"):
    """This planner drafts for the executor that asked."""

    planner_id: str
    feature_layers: tuple[int, ...] = ()
    """The states after these layers are wanted with each report, 1 is the first layer; rising."""
    feature_window: int = 0
    """Of the last so many tokens of a sequence that is opened."""


class OpenedSequence(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that starts to decode, or that a new planner has not seen: all its tokens so far.

    `num_decoded` of its tokens came since its first one on this executor, the start of SequenceProgress.decode_ms; None: all
    output but the first, which prefill gives. `features` are rows of bfloat16, as the planner asked for, of consecutive tokens;
    the last row is of the last token but one, as the last token's is not computed yet. Empty if there are none.
    """

    request_id: str
    tokens: tuple[int, ...]
    num_output: int
    max_output: int
    tpot_ms: float | None = None
    num_decoded: int | None = None
    tenant: str = ""
    """Model and `cache_salt`: sequences of other tenants must not show in its drafts."""
    features: bytes = b""


class SequenceProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What one verify step did to a sequence, or several. `tokens` were committed by it (bonus tokens included).

    `features` are as in OpenedSequence, of as many tokens, each one place earlier: the old last token to the new last but one.
    """

    request_id: str
    tokens: tuple[int, ...]
    num_drafted: int
    accepted_len: int
    num_output: int
    decode_ms: float
    features: bytes = b""


class IterationReport(msgspec.Struct, frozen=True, kw_only=True, tag="report.1"):
    """The state of an executor's decoding after iteration `iteration`: the planner answers with DraftTrees of that number.

    `token_budget` is the number of draft nodes (roots excluded) that the next iteration may hold; `t_spec_ms` its predicted
    latency without any (AdaServe section 3, the t_spec of formula 2), of which `wait_ms` are spent on getting drafts, `busy_ms`
    are what verifying beside a planner at work adds, and `other_ms` are for prompts and training, which drafts neither save nor
    cost; `base_tokens` are the roots that it holds anyway.
    """

    executor_id: str
    iteration: int
    opened: tuple[OpenedSequence, ...] = ()
    closed: tuple[str, ...] = ()
    progress: tuple[SequenceProgress, ...] = ()
    token_budget: int
    base_tokens: int
    num_others: int = 0
    """Roots of the other cohort, whose pass is part of `t_spec_ms` too."""
    t_spec_ms: float
    measured_ms: float | None = None
    """Mean of the iterations told of that did nothing but decode; None if there are none, or if they overlap (two cohorts)."""
    num_iterations: int = 1
    """Since the report before this one. Progress is that of all of them."""
    wait_ms: float = 0.0
    busy_ms: float = 0.0
    other_ms: float = 0.0
    patience_ms: float = math.inf
    """Trees that come later than this after the report are dropped."""
    latency: LatencyProfile


class DraftTree(msgspec.Struct, frozen=True, kw_only=True):
    """A draft tree in BFS order: node 0 is the last committed token, `parents[0]` is -1 and `parents[i] < i`.

    `length` is the number of committed tokens it continues; `probs[i]` the probability that the path to node i is accepted;
    `num_required` of its nodes were chosen for the request's SLO (node 0 excluded).
    """

    request_id: str
    length: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    probs: tuple[float, ...]
    num_required: int = 0


class DraftTrees(msgspec.Struct, frozen=True, kw_only=True, tag="trees.1"):
    """The planner's answer to the report of iteration `iteration`; a sequence without a tree decodes its root alone."""

    planner_id: str
    iteration: int
    trees: tuple[DraftTree, ...] = ()
    answer_ms: float = 0.0
    """What the planner took for it."""
    unknown: tuple[str, ...] = ()
    """Sequences of the report that the planner cannot follow: the executor opens them again."""
    num_resting: int = 0
    """Drafts do not pay at present: no drafts come for so many iterations after this one, unless things change."""


# --- finetuning: trainer <-> executor ----------------------------------------------------------------------------------
