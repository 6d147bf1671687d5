"""From settings to drafters; neural ones are imported here alone, when they are asked for, as they need torch."""

from __future__ import annotations

from common.config import ConfigError
from common.drafts import DraftSpec, parse_drafts
from services.planner.config import PlannerConfig
from services.planner.drafter import Drafter
from services.planner.mixed import MixedDrafter
from services.planner.ngram import NgramDrafter, Traffic


def make_drafter(config: PlannerConfig, *, is_calibrated: bool) -> MixedDrafter:
    """The drafters that `config.draft` names, as one. Raises ConfigError where one cannot work."""
    drafters = [_make(spec, config) for spec in parse_drafts(config.draft)]
    return MixedDrafter(drafters, forgetting=config.forgetting, is_frozen=not is_calibrated)


def _make(spec: DraftSpec, config: PlannerConfig) -> Drafter:
    if spec.kind == "ngram":
        return NgramDrafter(
            max_match=config.max_match,
            num_matches=config.num_matches,
            min_prob=config.min_prob,
            traffic=Traffic(config.traffic_tokens),
        )
    raise ConfigError(f"draft {spec} is not here yet")
