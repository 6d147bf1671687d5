"""Every Triton kernel compiles for Hopper, within its shared memory; the interpreter would take what a compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOPPER_SHARED_BYTES = 232448
KERNELS = Path(__file__).resolve().parent.parent / "kernels" / "triton_ops"
HELPERS = {"_rotated_kernel", "_step_kernel", "_tile_kernel", "_low_kernel", "_scored_kernel", "_matrix_kernel", "_hash_kernel"}
"""Parts of other kernels."""


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.triton_compile"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    written = [line for path in KERNELS.glob("*.py") for line in path.read_text().splitlines()]
    defined = {line.removeprefix("def ").split("(")[0] for line in written if line.startswith("def _") and "_kernel(" in line}
    assert {name for name, _, _ in lines} == defined - HELPERS
    assert all(int(shared) <= HOPPER_SHARED_BYTES for _, shared, _ in lines)
    matrix_units = {name for name, _, count in lines if int(count)}
    assert matrix_units >= {"_ragged_attention_kernel", "_rows_kernel", "_keys_kernel"}
