"""A trained drafter's folder but for its weights: the files' names, and what config.json says. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS, CARD = "config.json", "drafter.safetensors", "README.md"
FORMAT = "heddle-features-1"


class DrafterFilesError(ValueError):
    """A folder holds no such drafter; the message names it."""


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises DrafterFilesError."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise DrafterFilesError(f"{folder} is no drafter on features: {path}: {error.strerror}") from error
    except ValueError as error:
        raise DrafterFilesError(f"{folder} is no drafter on features: {path} is no JSON: {error}") from error
    found = config.get("format") if isinstance(config, dict) else None
    if not isinstance(config, dict) or found != FORMAT:
        raise DrafterFilesError(f"{folder} is no drafter on features: {path} has the format {found}, not {FORMAT}")
    return config
