"""Writes rows of results: CSV, lines on the screen, and what they were measured on. Knows no benchmark."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ISAS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""What decides how fast bf16 is on an x86 processor, best first."""


def commit() -> str:
    """The commit measured, or nothing outside a checkout."""
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def machine() -> str:
    """Cores, processor and the best instructions it has for bf16."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return f"{os.cpu_count()} x {platform.processor() or platform.machine()}"
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    isa = next((name for name in ISAS if name in facts.get("flags", "").split()), platform.machine())
    return f"{os.cpu_count()} x {facts.get('model name', platform.machine())}, {isa}"


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """All columns that any row has, in order of appearance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def line(row: Mapping[str, object]) -> str:
    """One row for people, without its empty cells."""
    return "  ".join(f"{name}={value}" for name, value in row.items() if value != "")
