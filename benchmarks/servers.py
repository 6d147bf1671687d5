"""Starts and stops the servers under test, Heddle and vLLM, as a user would. Knows processes, not what is measured."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

import psutil

from benchmarks.streams import MODEL
from common.nats_server import free_port
from kernels.cache import cache_dir
from services.cli.models import locate, usable_folder
from tests.stack import Stack, eventually

START_S = 1800.0
"""vLLM's first start in a user's account compiles the model."""
VLLM_STOP_S = 30.0
IDLE_PERCENT = 10.0
SETTLE_S = 20.0
VLLM_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
MAX_MODEL_LEN = 2048


def model_folder(name: str) -> Path:
    """The model's folder of safetensors; ends the program if it was not converted yet."""
    folder = usable_folder(locate(name), cache_dir())
    if folder is None:
        raise SystemExit(f"convert the model first: heddle convert {name}")
    return folder


def unwind_when_terminated() -> None:
    """SIGTERM ends this process as Ctrl-C does: servers in sessions of their own are stopped, not left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def stack(model_dir: Path, *options: str, settings: Mapping[str, str] | None = None) -> Iterator[Stack]:
    """A stack of its own in a temporary state directory; `settings` are its services' environment variables."""
    with tempfile.TemporaryDirectory() as folder:
        running = Stack(model_dir, Path(folder) / "state", *options, settings=settings).start()
        try:
            yield running
        finally:
            running.stop()


def settle(patience_s: float = SETTLE_S) -> None:
    """Wait until the machine is idle for a second: vLLM's worker spins for a while after its last answer, and whoever is asked
    then pays for it. Gives up after `patience_s`, with a line that says so.
    """
    deadline = time.monotonic() + patience_s
    while (busy := psutil.cpu_percent(interval=1.0)) > IDLE_PERCENT:
        if time.monotonic() > deadline:
            print(f"the machine is not idle: {busy:.0f}% busy", flush=True)
            return


class Vllm:
    """`vllm serve` of another environment, on a free port, without its prefix cache; with `cores`, on these alone."""

    def __init__(
        self, env: Path, model_dir: Path, log: Path, dtype: str, *options: str, cores: Sequence[int] | None = None
    ) -> None:
        self._cores = cores
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._bin = env.absolute() / "bin"
        self._log = log
        self._command = [
            str(self._bin / "vllm"), "serve", str(model_dir), "--served-model-name", MODEL, "--dtype", dtype,
            "--host", "127.0.0.1", "--port", str(self.port), "--no-enable-prefix-caching",
            "--max-model-len", str(MAX_MODEL_LEN), *options,
        ]  # fmt: skip

    def start(self, timeout_s: float = START_S) -> Vllm:
        """Start, if that was not done yet, and wait until it says that it is healthy.

        AssertionError with its log when it ends instead.
        """
        if self._process is None:
            self.launch()
        try:
            eventually(self._is_healthy, timeout_s)
        except BaseException:
            self.stop()
            raise
        return self

    def launch(self) -> None:
        """Start without waiting: what takes it minutes then goes on beside other things."""
        paths = {"PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}"}
        bound = {} if self._cores is None else {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self._cores))}
        with self._log.open("wb") as sink:
            self._process = subprocess.Popen(
                self._command,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=VLLM_SETTINGS | dict(os.environ) | paths | bound,
            )
        if self._cores is not None:
            os.sched_setaffinity(self._process.pid, self._cores)  # what it starts has the same

    def stop(self) -> int:
        """Ctrl-C, and an end to whatever of it does not follow; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(VLLM_STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """That of the server, once it was launched."""
        assert self._process is not None
        return self._process

    def _is_healthy(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()[-8000:]
        with suppress(OSError), closing(HTTPConnection("127.0.0.1", self.port, timeout=2)) as connection:  # cheap: asked often
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False
