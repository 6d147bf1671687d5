"""What the scheduler is told: its constants, and sequences as it sees them. Knows no plan."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Constants of an executor's scheduling."""

    max_iteration_ms: float = 250.0
    """Longest iteration while only requests without a TPOT target decode."""
    max_prefill_ms: float = 1000.0
    """Longest iteration that computes prompts while no request with a TPOT target decodes: one pass costs less than several."""
    idle_iteration_ms: float = 120.0
    """Longest iteration of finetuning alone: what a request that arrives meanwhile may have to wait."""
    interruptible_ms: float = 0.0
    """The same if it goes in units, each of half of that: a request waits for one of them only. 0: it never does."""
    max_batch_tokens: int = 1024
    min_prefill_tokens: int = 16
    """Prompt tokens that are worth a chunk: about a page. Behind a long context a smaller one costs nearly as much."""
    max_prefill_gap: int = 8
    """So many iterations in a row may leave waiting prompts with less than that; the next one computes it whatever T* says.

    Prefill yields to every target that can be met, but a prompt must end: this bounds its rate from below by a chunk per nine
    iterations, and what it adds to the mean time per token by a ninth of a chunk's cost, which `safety` has room for. A floor
    in each iteration would cost nine times that, and one row in each would read the whole context for a row.
    """
    node_share: float = 0.5
    """Share of the time beyond roots and required nodes that other draft nodes may take while prompts wait."""
    min_finetune_share: float = 0.1
    """Share of the iteration that finetuning gets whenever no request is behind its target."""
    finetune_weight: float = 0.25
    """Value of a finetuning token; a draft node's value is its probability of being accepted."""
    safety: float = 0.9
    """Share of a request's slack that an iteration may use: predictions err, and messages take time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceView:
    """A running sequence. `num_uncomputed` tokens have no KV yet: one while decoding, more while prefilling.

    `decode_ms` is the time since its first token, `num_decoded` the tokens after the first one.
    """

    request_id: str
    num_uncomputed: int
    is_decoding: bool
    context_tokens: int
    arrived_at: float
    priority: int = 0
    """Lower is prefilled earlier."""
    num_decoded: int = 0
    max_remaining: int = 1
    decode_ms: float = 0.0
    tpot_ms: float | None = None
    first_token_due_at: float | None = None
    tokens_per_step: float = 1.0
    """Mean of its decode iterations so far; what drafts may be hoped to bring."""
    tree_probs: tuple[float, ...] = ()
    num_required: int = 0
    num_unscored: int = 0
    """Of the uncomputed tokens so many, the first ones, whose rows are scored: each costs the model's head besides."""
    is_resting: bool = False
    """It decodes, but not in this iteration: the other half does (see cohorts)."""
