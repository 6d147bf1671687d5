"""Which drafters a setting names: `auto`, `ngram`, `model:FOLDER`, `features:FOLDER`, with commas. Knows no drafter."""

from __future__ import annotations

from typing import NamedTuple

from common.config import ConfigError

AUTO = "auto"
"""n-grams, and the head on features that ships with Heddle for this model, if there is one."""
KINDS_WITH_FOLDER = ("model", "features")
MAX_DRAFTERS = 3
"""Their mixes are calibrated apart, 3^n of them."""


class DraftSpec(NamedTuple):
    """One drafter: its kind, and the folder (or the name of one) that its weights are in."""

    kind: str
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.folder}" if self.folder else self.kind


def parse_drafts(text: str) -> tuple[DraftSpec, ...]:
    """The drafters of a comma-separated list. Raises ConfigError, naming the part that is wrong."""
    if text.strip() == AUTO:
        return DraftSpec("ngram"), DraftSpec(AUTO)
    specs = []
    for part in text.split(","):
        kind, _, folder = part.strip().partition(":")
        if (kind, folder) != ("ngram", "") and not (kind in KINDS_WITH_FOLDER and folder):
            raise ConfigError(f"draft must be auto, or a list of ngram, model:FOLDER and features:FOLDER, not {part.strip()!r}")
        specs.append(DraftSpec(kind, folder))
    if len(set(specs)) < len(specs):
        raise ConfigError(f"draft must not name a drafter twice: {text!r}")
    if len(specs) > MAX_DRAFTERS:
        raise ConfigError(f"draft must name at most {MAX_DRAFTERS} drafters")
    return tuple(specs)
