"""The kernel benchmark's cases pass their own checks at small sizes, and a wrong kernel does not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

import tests.triton_stage as stage
from benchmarks.kernel_cases import Cases, Sizes

SMALL = Sizes(
    rows=(3,), hidden=32, intermediate=40, heads=4, kv_heads=2, head_dim=16, vocabulary=50, context=40, decodes=(1, 3),
    prefill=20, adapters=(1, 3), rank=2, layers=2, moved=5,
)  # fmt: skip


def test_every_case_passes_its_check() -> None:
    seen = []
    for case in Cases(SMALL, torch.float16, stage.DEVICE):
        case.check()
        assert case.num_bytes or case.num_flops
        seen.append(case.kernel)
    assert len(seen) >= 15
    wrong = dataclasses.replace(case, run=lambda: tuple(1.1 * x for x in case.oracle()))
    with pytest.raises(ValueError, match="relative error"):
        wrong.check()


@pytest.mark.skipif(stage.HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = subprocess.run([sys.executable, "-m", "benchmarks.bench_kernels"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "torch sees none here" in result.stderr
