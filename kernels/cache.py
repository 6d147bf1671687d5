"""Where a user's cache is. Knows no file in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """HEDDLE_CACHE_DIR, else heddle/ in the user's cache."""
    if explicit := environ.get("HEDDLE_CACHE_DIR"):
        return Path(explicit).expanduser()
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "heddle"
