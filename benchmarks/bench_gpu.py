"""All that is measured on a GPU, in stages that each end in minutes and write what they have as they go.

kernels: each checked, then timed; iteration: whole passes of Llama-3.1-8B's shapes with random weights; peer: the same by
transformers; profile: the latency model. Needs an installed heddle (or its source) and this folder, no model and no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.gpu_results import Results

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STAGES = ("kernels", "iteration", "peer", "profile")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.tiny and not torch.cuda.is_available():  # both are read when kernels are first imported, so that follows
        os.environ |= {"TRITON_INTERPRET": "1", "HEDDLE_KERNELS": "triton"}
    from benchmarks import gpu_device
    from benchmarks.gpu_results import Results

    device = gpu_device.choose(is_tiny=options.tiny)
    dtype = DTYPES[options.dtype or ("fp32" if device.torch.type == "cpu" else "bf16")]
    results = Results(options.out, device.name + (" tiny" if options.tiny else ""))
    top = gpu_device.ceilings(device, dtype, is_tiny=options.tiny)
    print(f"{device.name}, {dtype}: copy {top.copy_gb_s:.0f} GB/s, matmul {top.matmul_tflop_s:.1f} TFLOP/s", flush=True)
    for stage in STAGES if options.stage == "all" else (options.stage,):
        results.start(stage, dtype=str(dtype).removeprefix("torch."), **top._asdict())
        _run(stage, device, dtype, top, results, options)
        device.forget()
        _plot(stage, results)
    print(f"written: {results.prefix}*")


def _run(stage: str, device: Any, dtype: torch.dtype, top: Any, results: Results, options: argparse.Namespace) -> None:
    from benchmarks import gpu_iteration, gpu_kernels, gpu_profile

    match stage:
        case "kernels":
            gpu_kernels.run(device, dtype, top, results, is_tiny=options.tiny)
        case "iteration":
            gpu_iteration.run(device, dtype, top, results, is_tiny=options.tiny)
        case "peer":
            gpu_iteration.run_peer(device, dtype, top, results, is_tiny=options.tiny)
        case "profile":
            path = gpu_profile.run(device, dtype, results, options.profiles or options.out, is_tiny=options.tiny)
            print(f"written: {path}")


def _plot(stage: str, results: Results) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (the extra `bench`)")
        return
    from benchmarks.gpu_kernels import plotted
    from benchmarks.gpu_plot import plot_iterations, plot_kernels

    title = results.prefix.name.removeprefix("gpu-")
    if stage == "kernels":
        plot_kernels(plotted(results.rows(stage)), title, results.path(stage, "svg"))
    if stage in ("iteration", "peer"):  # in one picture, whichever was run last
        rows = [*results.rows("iteration"), *results.rows("peer")]
        plot_iterations(rows, f"Llama-3.1-8B's shapes, {title}", results.path("iteration", "svg"))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, also without a GPU (in Triton's interpreter): proves the rest"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of CSV, JSON and plots")
    parser.add_argument("--profiles", type=Path, help="folder of the latency profile; default: profiles, or --out for --tiny")
    options = parser.parse_args(arguments)
    if options.profiles is None and not options.tiny:
        options.profiles = Path("profiles")
    return options


if __name__ == "__main__":
    main()
