"""A running Heddle for tests: `heddle up` as a child process, and services started by hand beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx

from common.nats_server import free_port

T = TypeVar("T")


def eventually(check: Callable[[], T], timeout_s: float = 30.0) -> T:
    """The first truthy result of `check`; fails with the last result after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not (result := check()):
        assert time.monotonic() < deadline, f"still {result!r} after {timeout_s} s"
        time.sleep(0.05)
    return result


class Stack:
    """`heddle up` on free ports with a state directory of its own."""

    def __init__(self, model_dir: Path, state_dir: Path, *options: str, settings: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model_dir = model_dir
        self.state_dir = state_dir
        self._options = options
        self._environment = {**os.environ, **(settings or {})}
        self._by_hand: list[subprocess.Popen[bytes]] = []

    def start(self, timeout_s: float = 90.0) -> Stack:
        """Start and wait for the screen that says it is up; nothing runs on when that takes too long."""
        log = self.state_dir.with_suffix(".screen")
        command = [sys.executable, "-m", "services.cli", "up", "--port", str(self.port), "--state-dir", str(self.state_dir)]
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [*command, "--model", str(self.model_dir), "--served-model-name", "smollm2", *self._options],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )

        def is_up() -> bool:
            assert self.process.poll() is None, log.read_text()
            return "Ctrl-C" in log.read_text()

        try:
            eventually(is_up, timeout_s)
        except BaseException:
            self.stop()
            raise
        self.screen = log.read_text()
        return self

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        for process in self._by_hand:
            process.terminate()
        for process in self._by_hand:
            process.wait(30)
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    @cached_property
    def nats_url(self) -> str:
        """Where its NATS server listens."""
        return str(self.status()["nats_url"])

    def status(self) -> dict[str, Any]:
        """What `heddle status --json` prints."""
        command = [sys.executable, "-m", "services.cli", "status", "--json", "--url", self.url]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return found

    def services(self, name: str) -> list[dict[str, Any]]:
        """The instances of one service, as the gateway sees them now."""
        everyone = httpx.get(f"{self.url}/status", timeout=10).json()["services"]
        return [service for service in everyone if service["name"] == name]

    def executor_gauge(self, name: str) -> float:
        """A gauge summed over executors."""
        return sum(float(service["load"][name]) for service in self.services("executor"))

    def pid_of(self, name: str) -> int:
        """Process id of the first instance of a service that the supervisor started."""
        children = subprocess.run(["ps", "-eo", "pid,ppid,args"], check=True, capture_output=True, text=True).stdout
        for line in children.splitlines():
            pid, parent, command = line.split(maxsplit=2)
            if parent == str(self.process.pid) and f"services.{name}" in command:
                return int(pid)
        raise AssertionError(f"no {name} among the children of {self.process.pid}")

    def kill(self, name: str) -> None:
        """SIGKILL the first instance of a service."""
        os.kill(self.pid_of(name), signal.SIGKILL)

    def start_by_hand(self, name: str, **settings: str) -> str:
        """Start one more instance as an operator would; returns its id once it is ready."""
        instance_id = f"hand-{name}-{len(self._by_hand)}"
        environment = os.environ | {
            "HEDDLE_NATS_URL": self.nats_url,
            "HEDDLE_MODEL_DIR": str(self.model_dir),
            "HEDDLE_SERVED_MODEL_NAME": "smollm2",
            f"HEDDLE_{name.upper()}_INSTANCE_ID": instance_id,
            **{f"HEDDLE_{name.upper()}_{field.upper()}": value for field, value in settings.items()},
        }
        with (self.state_dir / f"{instance_id}.log").open("wb") as log:
            self._by_hand.append(subprocess.Popen([sys.executable, "-m", f"services.{name}"], env=environment, stderr=log))
        eventually(lambda: any(s["id"] == instance_id and s["state"] == "ready" for s in self.services(name)), 60)
        return instance_id

    def stop_by_hand(self) -> list[int]:
        """Stop the instances that were started by hand; returns their exit codes."""
        processes, self._by_hand = self._by_hand, []
        for process in processes:
            process.terminate()
        return [process.wait(60) for process in processes]
