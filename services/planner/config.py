"""Settings of a planner; knows no executor."""

from __future__ import annotations

import dataclasses

from common.config import ConfigError, ServiceConfig, require
from common.drafts import parse_drafts
from common.speculation import parse_speculation


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannerConfig(ServiceConfig):
    """How drafts are made and chosen."""

    mode: str = "heddle"
    """heddle; adaserve (as published: largest debt first, the whole budget spent, raw probabilities);
    throughput (no debts, the best of all requests while tokens per ms rise); slo (what debts need, no more);
    equal (trees of one size for all, the whole budget spent); chain:K (K tokens for all, no trees);
    none (no speculation)."""
    draft: str = "auto"
    """auto: n-grams, and the trained drafter that ships for the model, if there is one. Or drafters, separated by commas: ngram
    continues earlier occurrences of the last tokens, model:FOLDER is a small model of the same vocabulary, features:FOLDER a
    head on the target's hidden states. Their candidates are mixed in one tree."""
    model_dir: str = ""
    """The served model's folder, which tells what drafter was trained for it, and its vocabulary; empty: auto means n-grams
    alone, and there can be no draft model."""
    draft_threads: int = 1
    """Threads of a neural drafter on a CPU, not more than there are cores."""
    draft_kv_bytes: int = 268_435_456
    """Keys and values of a draft model, for all sequences together."""
    min_depth: int = 2
    max_depth: int = 12
    max_width: int = 3
    draft_tokens: int = 96
    """B2 of formula 9: tokens that the drafter can extend in one step."""
    depth_offset: float = 0.0
    """c1 of formula 8."""
    width_offset: int = 0
    """c2 of formula 9."""
    min_prob: float = 0.02
    """Nodes that are less likely to be accepted are no candidates; on a flat part of the latency curve even 0.01 would pay."""
    max_match: int = 16
    """Longest match of the n-gram drafter."""
    num_matches: int = 8
    """Earlier occurrences that the n-gram drafter continues."""
    traffic_tokens: int = 65_536
    """Tokens of ended sequences that the n-gram drafter keeps for others of the same tenant; 0: none."""
    forgetting: float = 0.998
    """An accepted or rejected guess counts e times less after 1 / (1 - forgetting) more of its kind."""
    forget_after_s: float = 30.0
    """An executor that has not reported for so long has another planner or no work; it opens its sequences again if need be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            parse_speculation(self.mode)
        except ValueError as error:
            raise ConfigError(f"mode {error}") from None
        parse_drafts(self.draft)
        require(1 <= self.min_depth <= self.max_depth, "min_depth", "be at least 1 and at most max_depth")
        require(self.max_width >= 1, "max_width", "be at least 1")
        require(self.draft_threads >= 1, "draft_threads", "be at least 1")
        require(self.draft_kv_bytes >= 1, "draft_kv_bytes", "be at least 1")
        require(self.draft_tokens >= 1, "draft_tokens", "be at least 1")
        require(self.depth_offset >= 0, "depth_offset", "not be negative")
        require(0 < self.min_prob < 1, "min_prob", "be between 0 and 1")
        require(self.max_match >= 4, "max_match", "be at least 4")
        require(self.num_matches >= 1, "num_matches", "be at least 1")
        require(self.traffic_tokens >= 0, "traffic_tokens", "not be negative")
        require(0 < self.forgetting <= 1, "forgetting", "be above 0 and at most 1")
        require(self.forget_after_s > 0, "forget_after_s", "be positive")
