"""The supervisor, on children that are shell one-liners."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from common.config import EXIT_CONFIG
from services.cli.supervisor import Backoff, Child, ChildSpec, Supervisor, describe_exit

QUICK = Backoff(first_s=0.001, longest_s=0.002)
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl and pidfd are Linux's")


class Speech:
    """Collects what the supervisor says and lets a test wait for the n-th line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._changed = asyncio.Event()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self._changed.set()

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.lines) < count:
                self._changed.clear()
                await self._changed.wait()


def shell(tmp_path: Path, script: str, name: str = "child", id_variable: str = "") -> ChildSpec:
    return ChildSpec(
        name=name,
        command=("/bin/sh", "-c", script),
        log=tmp_path / f"{name}.log",
        env={"HERE": str(tmp_path)},
        id_variable=id_variable,
    )


@asynccontextmanager
async def supervisor(say: Callable[[str], None]) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(say, QUICK)
    yield supervisor
    await supervisor.stop([supervisor.children], 0.1)


def pipe(tmp_path: Path, name: str) -> Path:
    """A named pipe: reading it waits for the child that writes to it."""
    os.mkfifo(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(
    ("previous_s", "uptime_s", "expected_s"),
    [(0.0, 0.1, 1.0), (1.0, 0.1, 2.0), (2.0, 59.9, 4.0), (16.0, 1.0, 30.0), (30.0, 1.0, 30.0), (30.0, 60.0, 1.0)],
)
def test_backoff_doubles_up_to_a_limit_and_forgets_after_a_healthy_run(
    previous_s: float, uptime_s: float, expected_s: float
) -> None:
    assert Backoff().delay_s(previous_s, uptime_s) == expected_s


def test_exits_are_described_in_words() -> None:
    assert describe_exit(2) == "exited with status 2"
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-50) == "was killed by signal 50"


async def test_a_child_that_dies_is_restarted_as_a_new_peer_and_said_so(tmp_path: Path) -> None:
    speech = Speech()
    async with supervisor(speech) as keeper:
        keeper.mark_ready()
        keeper.add(shell(tmp_path, 'echo "$NAME" >> "$HERE/ids"; exit 3', id_variable="NAME"))
        await speech.wait_for(5)
        assert not keeper.failed.is_set()
    ids = (tmp_path / "ids").read_text().split()
    assert len(ids) >= 5
    assert len(set(ids)) == len(ids)
    assert speech.lines[0].startswith("child exited with status 3; restarting in 0.001 s (log: ")


async def test_a_child_that_never_starts_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    speech = Speech()
    async with supervisor(speech) as keeper:
        keeper.add(shell(tmp_path, "echo no such model >&2; exit 1"))
        await asyncio.wait_for(keeper.failed.wait(), 10)
    assert len(speech.lines) == 2
    assert "child exited with status 1, 3 times before it was ready" in str(keeper.failure)
    assert str(keeper.failure).endswith("no such model\nno such model\nno such model")


async def test_a_child_that_cannot_run_with_its_configuration_is_not_started_again(tmp_path: Path) -> None:
    speech = Speech()
    async with supervisor(speech) as keeper:
        child = keeper.add(shell(tmp_path, f"echo starting; echo heddle executor: no such device >&2; exit {EXIT_CONFIG}"))
        await asyncio.wait_for(keeper.failed.wait(), 10)
    assert str(keeper.failure) == f"executor: no such device (log: {child.spec.log})"
    assert (child.num_exits, speech.lines) == (1, [])


async def test_a_child_that_takes_long_to_stop_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.supervisor.WAITING_S", 0.02)
    up, speech = pipe(tmp_path, "up"), Speech()
    keeper = Supervisor(speech, QUICK)
    child = keeper.add(shell(tmp_path, 'trap "" TERM; echo up > "$HERE/up"; while :; do sleep 0.01; done', "executor-1"))
    await asyncio.to_thread(up.read_text)
    stopping = asyncio.create_task(keeper.stop([[child]], 60))
    await speech.wait_for(1)
    assert speech.lines == ["waiting for executor-1 to finish running work, at most 60 s more"]
    keeper.kill()
    await asyncio.wait_for(stopping, 10)


async def test_a_command_that_does_not_exist_is_given_up_at_once(tmp_path: Path) -> None:
    async with supervisor(Speech()) as keeper:
        keeper.add(ChildSpec(name="child", command=("/no/such/program",), log=tmp_path / "log"))
        await asyncio.wait_for(keeper.failed.wait(), 10)
    assert "child cannot be started" in str(keeper.failure)


async def test_children_stop_stage_by_stage_and_are_not_restarted(tmp_path: Path) -> None:
    keeper = Supervisor(Speech(), QUICK)
    script = 'trap \'echo {0} >> "$HERE/stopped"; exit 0\' TERM; echo up > "$HERE/{0}"; while :; do sleep 0.01; done'
    pipes = [pipe(tmp_path, name) for name in ("a", "b", "c")]
    first, second, third = (keeper.add(shell(tmp_path, script.format(path.name), path.name)) for path in pipes)
    for path in pipes:
        await asyncio.to_thread(path.read_text)
    await keeper.stop([[second], [third], [first]], 10)
    assert (tmp_path / "stopped").read_text().split() == ["b", "c", "a"]
    assert [child.num_exits for child in keeper.children] == [0, 0, 0]


async def test_a_child_that_ignores_the_signal_is_killed_after_the_grace(tmp_path: Path) -> None:
    up = pipe(tmp_path, "up")
    keeper = Supervisor(Speech(), QUICK)
    child = keeper.add(shell(tmp_path, 'trap "" TERM; echo up > "$HERE/up"; while :; do sleep 0.01; done'))
    await asyncio.to_thread(up.read_text)
    await keeper.stop([[child]], 0.05)
    assert child.process is not None
    assert child.process.returncode == -signal.SIGKILL


async def test_a_stop_amid_a_start_ends_the_child_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn, spawned, known = asyncio.create_subprocess_exec, asyncio.Event(), asyncio.Event()

    async def slow_spawn(*command: str, **options: Any) -> asyncio.subprocess.Process:
        process = await spawn(*command, **options)
        spawned.set()
        await known.wait()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow_spawn)
    keeper = Supervisor(Speech(), QUICK)
    child = keeper.add(shell(tmp_path, "while :; do sleep 0.01; done"))
    await asyncio.wait_for(spawned.wait(), 10)
    stopping = asyncio.create_task(keeper.stop([[child]], 10))
    await asyncio.sleep(0)
    known.set()
    await asyncio.wait_for(stopping, 10)
    assert child.process is not None
    assert child.process.returncode == -signal.SIGTERM


async def test_kill_reaches_a_child_that_is_just_being_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up, started, create = pipe(tmp_path, "up"), asyncio.Event(), asyncio.create_subprocess_exec

    async def slow(*command: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await create(*command, **options)
        await started.wait()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow)
    keeper = Supervisor(Speech(), QUICK)
    child = keeper.add(shell(tmp_path, 'trap "" TERM; echo up > "$HERE/up"; while :; do sleep 0.01; done'))
    await asyncio.to_thread(up.read_text)
    stopping = asyncio.create_task(keeper.stop([[child]], 60))
    await asyncio.sleep(0)
    keeper.kill()
    started.set()
    await asyncio.wait_for(stopping, 10)
    assert not child.is_running


async def test_kill_hurries_a_stop(tmp_path: Path) -> None:
    up = pipe(tmp_path, "up")
    keeper = Supervisor(Speech(), QUICK)
    child = keeper.add(shell(tmp_path, 'trap "" TERM; echo up > "$HERE/up"; while :; do sleep 0.01; done'))
    await asyncio.to_thread(up.read_text)
    stopping = asyncio.create_task(keeper.stop([[child]], 60))
    await asyncio.sleep(0)
    keeper.kill()
    await asyncio.wait_for(stopping, 10)


async def test_stopping_during_a_restart_leaves_nothing_behind(tmp_path: Path) -> None:
    speech = Speech()
    keeper = Supervisor(speech, Backoff(first_s=60))
    keeper.mark_ready()
    child = keeper.add(shell(tmp_path, "exit 0"))
    await speech.wait_for(1)
    await asyncio.wait_for(keeper.stop([[child]], 60), 10)
    assert child.num_exits == 1


async def test_a_terminal_s_interrupt_does_not_reach_children(tmp_path: Path) -> None:
    async with supervisor(Speech()) as keeper:
        up = pipe(tmp_path, "up")
        keeper.add(shell(tmp_path, 'echo $$ > "$HERE/up"; exec sleep 60'))
        pid = int(await asyncio.to_thread(up.read_text))
        assert os.getpgid(pid) == pid != os.getpgid(0)


ORPHANS = """
import asyncio, sys
from pathlib import Path
from services.cli.supervisor import ChildSpec, Supervisor

async def run() -> None:
    supervisor = Supervisor(print)
    for i in range(2):
        supervisor.add(ChildSpec(name=str(i), command=("sleep", "60"), log=Path(sys.argv[1]) / str(i)))
    while any(child.process is None for child in supervisor.children):
        await asyncio.sleep(0.001)
    print(*(child.process.pid for child in supervisor.children), flush=True)
    await asyncio.sleep(60)

asyncio.run(run())
"""


@linux_only
def test_children_do_not_survive_a_killed_supervisor(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    handles = [os.pidfd_open(pid) for pid in pids]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    for handle in handles:
        ended, _, _ = select.select([handle], [], [], max(deadline - time.monotonic(), 0))
        assert ended, "a child outlived its supervisor"
        os.close(handle)


def test_the_log_s_tail_is_short_and_survives_odd_bytes(tmp_path: Path) -> None:
    spec = shell(tmp_path, "")
    assert Child(spec).log_tail() == ""
    spec.log.write_bytes(b"\n".join([b"%d" % i for i in range(100)]) + b"\xff\n")
    assert Child(spec).log_tail(2) == "98\n99\ufffd"
