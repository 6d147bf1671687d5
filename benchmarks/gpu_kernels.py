"""bench_gpu's first stage: each kernel checked, then timed beside its peers and held against its goal. Knows no model."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from benchmarks.gpu_device import Ceilings, Device, Times
from benchmarks.gpu_results import Results, Row
from benchmarks.kernel_case import Case, Sizes
from benchmarks.kernel_cases import Cases

STAGE = "kernels"
TINY = Sizes(
    rows=(3,), hidden=32, intermediate=40, heads=4, kv_heads=2, head_dim=16, vocabulary=50, context=40, decodes=(2,),
    tree_nodes=3, prefill=32, mixed_decodes=1, loss_rows=2, adapters=(2,), lora_rows=(2,), rank=2, layers=2, moved=5,
)  # fmt: skip


def run(device: Device, dtype: torch.dtype, top: Ceilings, results: Results, *, is_tiny: bool) -> None:
    """A row per kernel, shape and provider; a kernel that is wrong has a row that says so, and is not timed."""
    num_wrong = 0
    for case in Cases(TINY if is_tiny else Sizes(), dtype, device.torch):
        try:
            case.check()
        except ValueError as error:
            num_wrong += 1
            results.add(STAGE, {"kernel": case.kernel, "shape": case.shape, "provider": "heddle", "wrong": str(error)})
            continue
        for row in _timed(case, device, top):
            results.add(STAGE, row)
        device.forget()
    if num_wrong:
        raise SystemExit(f"{num_wrong} cases are wrong; the others were timed")


def _timed(case: Case, device: Device, top: Ceilings) -> list[Row]:
    """Peers first: the kernel's own row may be told in terms of the first one."""
    peers: list[tuple[str, Callable[[], object], bool]] = [(name, peer, True) for name, peer in case.peers.items()]
    peers = peers or [("reference", case.oracle, False)]  # the oracle may read the device's values
    found = [(name, device.times(call, is_recordable=is_recordable)) for name, call, is_recordable in peers]
    ours = device.times(case.timed or case.run)
    rows = [_row(case, name, times, top) for name, times in [("heddle", ours), *found]]
    rows[0]["over_peer"] = ours.p50_ms / found[0][1].p50_ms - 1
    if case.goal is not None:
        value = rows[0][case.goal.measure]
        assert isinstance(value, float)
        rows[0] |= {"goal": str(case.goal), "is_met": case.goal.is_met(value)}
    return rows


def _row(case: Case, provider: str, times: Times, top: Ceilings) -> Row:
    gb_s, tflop_s = case.num_bytes / times.p50_ms / 1e6, case.num_flops / times.p50_ms / 1e9
    return {
        "kernel": case.kernel, "shape": case.shape, "provider": provider, **times._asdict(), "gb_s": gb_s or "",
        "tflop_s": tflop_s or "", "of_copy": gb_s / top.copy_gb_s, "of_matmul": tflop_s / top.matmul_tflop_s,
    }  # fmt: skip


def plotted(rows: list[Row]) -> list[tuple[str, float, float | None]]:
    """Label, share of the ceiling that binds, goal: of each of our rows that has one."""
    found: list[tuple[str, float, float | None]] = []
    for row in itertools.filterfalse(lambda row: row["provider"] != "heddle" or "p50_ms" not in row, rows):
        of_copy, of_matmul = (float(str(row[name])) for name in ("of_copy", "of_matmul"))
        goal = str(row.get("goal", ""))
        share = None if not goal or goal.startswith("over_peer") else float(goal.split()[-1].rstrip("%")) / 100
        label = f"{row['kernel']}, {row['shape']}"
        found.append((label, of_matmul if goal.startswith("of_matmul") else max(of_copy, of_matmul), share))
    return found
