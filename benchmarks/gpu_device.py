"""The device that the GPU benchmark measures: its ceilings, how long a call takes, what it launches. Knows no kernel, no model.

Without CUDA the same is asked of the CPU, where Triton's interpreter runs: that proves the benchmark, and measures nothing.
"""

from __future__ import annotations

import gc
import platform
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[], object]
COPIED_BYTES = 1 << 30
MATMUL_SIZE = 8192
FLUSHED_BYTES = 256 << 20
"""Written before each call that is timed: more than any L2 cache holds."""
MEASURED_MS = 300.0
"""Of each call, warm-up apart; at least MIN_REPEATS of them."""
MIN_REPEATS = 10
MAX_REPEATS = 500
LAUNCHES = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch|MemcpyAsync|MemsetAsync)\w*")
"""The host's calls that put work on the device."""


class Times(NamedTuple):
    """Quantiles of one call, and by which clock: the device's around a recorded graph or the plain call, or the host's."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    clock: str


class Launches(NamedTuple):
    """Of one call: kernels that ran, copies between memories, and how often the host told the device to do something."""

    kernels: int
    copies: int
    host_launches: int


class Ceilings(NamedTuple):
    """What this device reaches on the simplest work there is."""

    copy_gb_s: float
    matmul_tflop_s: float


class Device(Protocol):
    """CudaDevice, or CpuDevice in its place."""

    name: str
    torch: torch.device

    def times(self, call: Call, *, is_recordable: bool = True) -> Times:
        """The time that the device takes, with a cold L2 cache; without the host's if the call can be recorded."""
        ...

    def wall(self, call: Call) -> Times:
        """The time from start to end on the host, which waits for the device."""
        ...

    def launches(self, call: Call) -> Launches:
        """What one call launches."""
        ...

    def forget(self) -> None:
        """Give memory back that nobody holds."""
        ...


def choose(*, is_tiny: bool) -> Device:
    """CUDA's first device; the CPU for a tiny run without one. Raises SystemExit for another run without one."""
    if torch.cuda.is_available():
        return CudaDevice()
    if not is_tiny:
        raise SystemExit("bench_gpu measures a GPU, and torch sees none here; --tiny proves it on a CPU")
    return CpuDevice()


def ceilings(device: Device, dtype: torch.dtype, *, is_tiny: bool) -> Ceilings:
    """GB/s of a copy, bytes read and written, and TFLOP/s of a square product."""
    num_bytes, size = (1 << 16, 32) if is_tiny else (COPIED_BYTES, MATMUL_SIZE)
    source = torch.randint(255, (num_bytes,), dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    copied = device.times(lambda: target.copy_(source))
    x = torch.randn(size, size, device=device.torch).to(dtype)
    product = device.times(lambda: x @ x)
    return Ceilings(2 * num_bytes / copied.p50_ms / 1e6, 2 * size**3 / product.p50_ms / 1e9)


class CudaDevice:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()
        self.torch = torch.device("cuda")
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=self.torch)

    def times(self, call: Call, *, is_recordable: bool = True) -> Times:
        call()
        torch.cuda.synchronize()
        recorded = _recorded(call) if is_recordable else None
        run, clock = (call, "events") if recorded is None else (recorded, "graph")
        spent_ms = self._events(run, 3)
        repeats = min(max(int(MEASURED_MS / max(spent_ms[-1], 1e-3)), MIN_REPEATS), MAX_REPEATS)
        return _quantiles(self._events(run, repeats), clock)

    def _events(self, run: Call, repeats: int) -> list[float]:
        event: Any = torch.cuda.Event
        pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(repeats)]
        for start, end in pairs:
            self._flushed.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def wall(self, call: Call) -> Times:
        return _wall(call, torch.cuda.synchronize)

    def launches(self, call: Call) -> Launches:
        call()
        torch.cuda.synchronize()
        profiler: Any = torch.profiler
        kinds = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.CUDA]
        with profiler.profile(activities=kinds) as profile:
            call()
            torch.cuda.synchronize()
        events = [(event.name, event.device_type.name == "CUDA") for event in profile.events()]
        on_device = [name for name, is_cuda in events if is_cuda]
        copies = sum(name.startswith(("Memcpy", "Memset")) for name in on_device)
        host = sum(bool(LAUNCHES.fullmatch(name)) for name, is_cuda in events if not is_cuda)
        return Launches(len(on_device) - copies, copies, host)

    def forget(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class CpuDevice:
    """A CPU in place of a GPU: few repeats, by the host's clock; operators in place of launches."""

    def __init__(self) -> None:
        self.name = f"interpreter on {platform.machine()}"
        self.torch = torch.device("cpu")
        self._launched: dict[Call, Launches] = {}

    def times(self, call: Call, *, is_recordable: bool = True) -> Times:
        return self.wall(call)

    def wall(self, call: Call) -> Times:
        with _Operators() as operators:
            times = _wall(call, lambda: None, measured_ms=0.0, min_repeats=1)
        self._launched = {call: Launches(operators.num_calls, operators.num_copies, operators.num_calls + operators.num_copies)}
        return times

    def launches(self, call: Call) -> Launches:
        """Counted while it was timed: the interpreter is slow."""
        if call not in self._launched:
            self.wall(call)
        return self._launched[call]

    def forget(self) -> None:
        gc.collect()


def _recorded(call: Call) -> Call | None:
    """Replays the call's launches without the host's part in them; its tensors stay where they were. None if it waits."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"timed with the host's part, as it cannot be recorded: {str(error).partition(chr(10))[0]}")
        return None

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def _wall(call: Call, wait: Call, measured_ms: float = MEASURED_MS, min_repeats: int = MIN_REPEATS) -> Times:
    if measured_ms:  # warm
        call()
    spent: list[float] = []
    while len(spent) < min_repeats or (sum(spent) < measured_ms and len(spent) < MAX_REPEATS):
        wait()
        started_at = time.perf_counter()
        call()
        wait()
        spent.append((time.perf_counter() - started_at) * 1e3)
    return _quantiles(spent, "host")


def _quantiles(spent_ms: list[float], clock: str) -> Times:
    quantiles = torch.tensor(spent_ms, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20_ms, p50_ms, p80_ms = quantiles.tolist()
    return Times(p20_ms, p50_ms, p80_ms, clock)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and copies apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_calls = self.num_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_copy = func.overloadpacket.__name__ in ("copy_", "_to_copy")
        self.num_copies += is_copy
        self.num_calls += not is_copy
        return func(*args, **(kwargs or {}))
