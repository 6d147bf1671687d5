"""From settings to drafters; neural ones are imported here alone, when they are asked for, as they need torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from common.config import ConfigError
from common.drafts import AUTO, parse_drafts
from common.fingerprint import fingerprint
from common.model_folder import ModelFolderError
from services.planner.config import PlannerConfig
from services.planner.drafter import Drafter, FeatureNeed
from services.planner.mixed import MixedDrafter
from services.planner.ngram import NgramDrafter, Traffic
from services.planner.vocabulary import check_same_vocabulary

if TYPE_CHECKING:
    from services.planner.features import FeaturesDrafter
    from services.planner.model import ModelDrafter

SHIPPED = Path(__file__).with_name("weights")
"""Drafters that come with Heddle: one folder for each model."""
log = structlog.get_logger()


def make_drafter(config: PlannerConfig, *, is_calibrated: bool, clock: Callable[[], float] = time.perf_counter) -> MixedDrafter:
    """The drafters that `config.draft` names, as one. Raises ConfigError where one cannot work. `clock` is in seconds."""
    drafters: list[Drafter] = []
    needs: list[FeatureNeed] = []
    for spec in parse_drafts(config.draft):
        folder = shipped_for(config.model_dir) if spec.kind == AUTO else Path(spec.folder)
        if spec.kind == "ngram":
            drafters.append(
                NgramDrafter(
                    max_match=config.max_match,
                    num_matches=config.num_matches,
                    min_prob=config.min_prob,
                    traffic=Traffic(config.traffic_tokens),
                )
            )
        elif spec.kind in ("features", AUTO) and folder is not None:
            features = _features(folder, config)
            drafters.append(features)
            needs.append(features.need)
        elif spec.kind == "model":
            drafters.append(_model(Path(spec.folder), config))
    if len(set(needs)) > 1:
        raise ConfigError(f"draft {config.draft}: one drafter on features at a time")
    return MixedDrafter(
        drafters, forgetting=config.forgetting, is_frozen=not is_calibrated, need=needs[0] if needs else None, clock=clock
    )


def shipped_for(model_dir: str) -> Path | None:
    """The shipped drafter that was trained for the model in this folder, if there is one."""
    try:
        name = fingerprint(Path(model_dir)) if model_dir else ""
    except ModelFolderError as error:
        log.warning("planner.unknown_model", model_dir=model_dir, error=str(error))
        return None
    for path in sorted(SHIPPED.glob("*/config.json")):
        if json.loads(path.read_text())["fingerprint"] == name:
            return path.parent
    return None


def _model(folder: Path, config: PlannerConfig) -> ModelDrafter:
    if not config.model_dir:
        raise ConfigError(f"model_dir must name the served model's folder: draft model:{folder} needs its vocabulary")
    check_same_vocabulary(folder, Path(config.model_dir))
    import torch

    from services.planner.draft_model import DraftModel
    from services.planner.model import ModelDrafter

    torch.set_num_threads(min(config.draft_threads, os.cpu_count() or 1))
    return ModelDrafter(DraftModel(folder, kv_bytes=config.draft_kv_bytes), min_prob=config.min_prob)


def _features(folder: Path, config: PlannerConfig) -> FeaturesDrafter:
    import torch

    from services.planner.features import FeaturesDrafter
    from services.planner.features_head import FeaturesHead

    torch.set_num_threads(min(config.draft_threads, os.cpu_count() or 1))
    drafter = FeaturesDrafter(FeaturesHead(folder), min_prob=config.min_prob)
    drafter.warm_up()
    return drafter
