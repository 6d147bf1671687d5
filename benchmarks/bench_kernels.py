"""Checks each Triton kernel against the reference, then times it on a GPU beside torch. Knows no model.

Prints and writes p20, p50 and p80 in ms, GB/s or TFLOP/s, and the share of what a copy and a matmul reach on this device.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COPIED_BYTES = 1 << 30
MATMUL_SIZE = 8192


class Times(NamedTuple):
    """Quantiles of one call."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


class Ceilings(NamedTuple):
    """What this device reaches on the simplest work there is."""

    copy_gb_s: float
    matmul_tflop_s: float


def measure(call: Callable[[], object]) -> Times:
    """Warm, with a cold L2 cache before every call, by the device's own events."""
    testing: Any = importlib.import_module("triton.testing")
    return Times(*testing.do_bench(call, quantiles=[0.2, 0.5, 0.8]))


def ceilings(dtype: torch.dtype) -> Ceilings:
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = measure(lambda: target.copy_(source))
    x = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").to(dtype)
    product = measure(lambda: x @ x)
    return Ceilings(2 * COPIED_BYTES / copied.p50_ms / 1e6, 2 * MATMUL_SIZE**3 / product.p50_ms / 1e9)


def rows(dtype_name: str) -> Iterator[dict[str, object]]:
    """One row per kernel, shape and provider; a kernel that is wrong ends the run before it is timed."""
    from benchmarks.kernel_cases import Cases, Sizes

    dtype = DTYPES[dtype_name]
    top = ceilings(dtype)
    print(
        f"{torch.cuda.get_device_name()}: copy {top.copy_gb_s:.0f} GB/s, {dtype_name} matmul {top.matmul_tflop_s:.0f} TFLOP/s"
    )
    shared = {"dtype": dtype_name, "device": torch.cuda.get_device_name(), "commit": commit(), "torch": torch.__version__}
    for case in Cases(Sizes(), dtype, torch.device("cuda")):
        case.check()
        for provider, call in (("triton", case.timed or case.run), ("torch", case.peer or case.oracle)):
            times = measure(call)
            rates = {
                "gb_s": case.num_bytes / times.p50_ms / 1e6,
                "tflop_s": case.num_flops / times.p50_ms / 1e9,
            }
            yield {
                "kernel": case.kernel, "shape": case.shape, "provider": provider, **times._asdict(), **rates,
                "of_copy": rates["gb_s"] / top.copy_gb_s, "of_matmul": rates["tflop_s"] / top.matmul_tflop_s, **shared,
            }  # fmt: skip


def commit() -> str:
    """The commit measured, or nothing outside a checkout."""
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def line(row: dict[str, object]) -> str:
    text = f"{row['kernel']:<24} {row['shape']:<52} {row['provider']:<7}"
    rates = f"{row['gb_s']:6.0f} GB/s ({row['of_copy']:4.0%}) {row['tflop_s']:6.1f} TFLOP/s ({row['of_matmul']:4.0%})"
    return f"{text} {row['p50_ms']:8.4f} ms {rates}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/kernels.csv"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels times Triton kernels on a GPU, and torch sees none here")
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="") as file:
        writer = None
        for row in rows(options.dtype):
            writer = writer or csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            print(line(row), flush=True)


if __name__ == "__main__":
    main()
