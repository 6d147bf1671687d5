"""Every Triton kernel compiles for Hopper and for sm_80 within their shared memory and without spilling much.

The interpreter would take what a compiler refuses.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {90: 232448, 80: 166912}
"""Of one program, by architecture."""
MAX_STACK_BYTES = 64
"""Of a thread: more would be spilled in loops."""
KERNELS = Path(__file__).resolve().parent.parent / "kernels" / "triton_ops"
HELPERS = {"_rotated_kernel", "_step_kernel", "_tile_kernel", "_low_kernel", "_scored_kernel", "_matrix_kernel", "_hash_kernel"}
"""Parts of other kernels."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_every_kernel_compiles(architecture: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.triton_compile", str(architecture)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    written = [line for path in KERNELS.glob("*.py") for line in path.read_text().splitlines()]
    defined = {line.removeprefix("def ").split("(")[0] for line in written if line.startswith("def _") and "_kernel(" in line}
    assert {name for name, *_ in lines} == defined - HELPERS
    for name, shared, _, registers, stack in lines:
        assert int(shared) <= SHARED_BYTES[architecture], name
        assert int(stack) <= MAX_STACK_BYTES, f"{name}: {registers} registers and {stack} bytes of stack"
    if architecture < 90:
        return
    matrix_units = {name for name, _, count, *_ in lines if int(count)}
    assert matrix_units >= {"_ragged_attention_kernel", "_rows_kernel", "_keys_kernel"}
