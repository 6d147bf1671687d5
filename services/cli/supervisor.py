"""Child processes: started, logged to files, restarted with backoff, stopped in order. Knows processes, not what they do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from common.config import EXIT_CONFIG
from services.cli.parent_death import die_with_parent

STARTUP_EXITS = 3
"""A child that exits so often before all are ready will not start at all."""
WAITING_S = 2.0
"""A child that takes longer to stop is named, so that nobody wonders what the wait is for."""


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """How to run one child. `id_variable`, when given, is set to a new id at every start, so that a restart is a new peer."""

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    id_variable: str = ""


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How long to wait before a restart: doubling, from `first_s` again after a run of `healthy_s`."""

    first_s: float = 1.0
    longest_s: float = 30.0
    healthy_s: float = 60.0

    def delay_s(self, previous_s: float, uptime_s: float) -> float:
        """The delay after a run of `uptime_s` that itself followed a delay of `previous_s` (0: the first run)."""
        if previous_s == 0 or uptime_s >= self.healthy_s:
            return self.first_s
        return min(2 * previous_s, self.longest_s)


class StartupError(RuntimeError):
    """A child kept exiting before all were ready; the message says which, how, and its last log lines."""


class Child:
    """One child and its restarts. `instance_id` belongs to the present run."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.instance_id = ""
        self.num_exits = 0
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> asyncio.subprocess.Process:
        """Run the command in a process group of its own, so that a terminal's Ctrl-C does not reach it."""
        self.instance_id = uuid4().hex[:8]
        own = {self.spec.id_variable: self.instance_id} if self.spec.id_variable else {}
        with self.spec.log.open("ab") as sink:
            starting = asyncio.ensure_future(
                asyncio.create_subprocess_exec(
                    *self.spec.command,
                    env={**os.environ, **self.spec.env, **own},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    process_group=0,
                    preexec_fn=die_with_parent(),
                )
            )
            try:
                self.process = await asyncio.shield(starting)
            except asyncio.CancelledError:
                self.process = await starting  # it runs already: whoever cancelled must be able to end it
                raise
        return self.process

    @property
    def is_running(self) -> bool:
        """Whether its process has been started and has not ended."""
        return self.process is not None and self.process.returncode is None

    def signal(self, number: int) -> None:
        """Send a signal to the child's whole group, if it runs."""
        if self.process is not None and self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def log_tail(self, lines: int = 15) -> str:
        """The last lines that the child wrote."""
        text = self.spec.log.read_text(errors="replace") if self.spec.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


class Supervisor:
    """Keeps children running until stop(). When one cannot be started, `failure` says why and `failed` is set."""

    def __init__(self, say: Callable[[str], None], backoff: Backoff | None = None) -> None:
        self.children: list[Child] = []
        self.failed = asyncio.Event()
        self.failure: StartupError | None = None
        self._say = say
        self._backoff = backoff or Backoff()
        self._all_ready = False
        self._is_hurried = False
        self._keepers: list[asyncio.Task[None]] = []

    def add(self, spec: ChildSpec) -> Child:
        """Start a child now and keep it running."""
        child = Child(spec)
        self.children.append(child)
        self._keepers.append(asyncio.create_task(self._keep(child)))
        return child

    def mark_ready(self) -> None:
        """From now on a child that exits is restarted however often it does."""
        self._all_ready = True

    async def stop(self, stages: Iterable[Sequence[Child]], grace_s: float) -> None:
        """SIGTERM stage by stage, each after the one before has ended; what is left of one after `grace_s` is killed."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for stage in stages:
            for child in stage:  # one that was just being started may have missed kill()
                child.signal(signal.SIGKILL if self._is_hurried else signal.SIGTERM)
            await _wait(stage, min(WAITING_S, grace_s))
            if names := [child.spec.name for child in stage if child.is_running]:
                left_s = max(grace_s - WAITING_S, 0.0)
                self._say(f"waiting for {', '.join(names)} to finish running work, at most {left_s:.0f} s more")
                await _wait(stage, left_s)
            for child in stage:
                child.signal(signal.SIGKILL)
            await _wait(stage, 5.0)

    def kill(self) -> None:
        """SIGKILL to all that still runs, to hurry a stop() that is under way."""
        self._is_hurried = True
        for child in self.children:
            child.signal(signal.SIGKILL)

    async def _keep(self, child: Child) -> None:
        delay_s = 0.0
        while True:
            started_at = time.monotonic()
            try:
                status = await (await child.start()).wait()
            except OSError as error:
                self._give_up(child, f"cannot be started: {error}")
                return
            child.num_exits += 1
            if not self._all_ready and status == EXIT_CONFIG:
                self._refuse(child)
                return
            if not self._all_ready and child.num_exits >= STARTUP_EXITS:
                self._give_up(child, f"{describe_exit(status)}, {child.num_exits} times before it was ready")
                return
            delay_s = self._backoff.delay_s(delay_s, time.monotonic() - started_at)
            self._say(f"{child.spec.name} {describe_exit(status)}; restarting in {delay_s:g} s (log: {child.spec.log})")
            await asyncio.sleep(delay_s)

    def _refuse(self, child: Child) -> None:
        """It has said in its last line why it cannot run with what it was given; another attempt would say the same."""
        reason = child.log_tail(1).removeprefix("heddle ")
        self.failure = StartupError(f"{reason} (log: {child.spec.log})")
        self.failed.set()

    def _give_up(self, child: Child, reason: str) -> None:
        self.failure = StartupError(f"{child.spec.name} {reason}. The end of {child.spec.log}:\n{child.log_tail()}")
        self.failed.set()


async def _wait(children: Sequence[Child], timeout_s: float) -> None:
    running = [child.process.wait() for child in children if child.process is not None]
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*running), timeout_s)


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exited with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"
