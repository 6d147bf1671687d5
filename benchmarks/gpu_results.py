"""Keeps what the GPU benchmark measured: one JSON file of all stages and a CSV file for each, after every row. Knows no stage.

A stage that is cut off has left its rows so far; a stage that is run again replaces its own rows only.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.report import commit, line, write_csv

Row = dict[str, object]


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


class Results:
    """The rows of one device, in files that begin with its name."""

    def __init__(self, folder: Path, device_name: str) -> None:
        self.prefix = folder / f"gpu-{slug(device_name)}"
        self.json_path = self.prefix.with_name(self.prefix.name + ".json")
        self.stages: dict[str, dict[str, object]] = {}
        if self.json_path.exists():
            self.stages = json.loads(self.json_path.read_text())["stages"]
        self._device_name = device_name

    def start(self, stage: str, **facts: object) -> None:
        """Forget the stage's rows of before; `facts` hold for all that come."""
        versions = {name: _version(name) for name in ("torch", "triton", "transformers", "flashinfer-python")}
        shared = {"commit": commit(), "python": platform.python_version(), **versions, **facts}
        self.stages[stage] = {**shared, "rows": []}
        self._write(stage)

    def add(self, stage: str, row: Row) -> None:
        """Keep a row, and show it."""
        row = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}
        self.rows(stage).append(row)
        self._write(stage)
        print(line(row), flush=True)

    def rows(self, stage: str) -> list[Row]:
        """All rows of a stage so far; none if it never ran."""
        found = self.stages.get(stage, {"rows": []})["rows"]
        assert isinstance(found, list)
        return found

    def path(self, stage: str, suffix: str) -> Path:
        """Of a stage's file."""
        return self.prefix.with_name(f"{self.prefix.name}-{stage}.{suffix}")

    def _write(self, stage: str) -> None:
        self.json_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.json_path, {"device": self._device_name, "cuda": torch.version.cuda, "stages": self.stages})
        write_csv(self.path(stage, "csv"), self.rows(stage))


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
