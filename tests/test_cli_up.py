"""`heddle up`: what it would run, what it checks first, and a whole life with services that do nothing."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest

from common.config import ServiceConfig, load_config
from common.messages import Role
from common.nats_server import NatsServer, free_port
from services.cli.layout import START_ORDER, Model, UpOptions, curl_line, environment, screen, service_specs
from services.cli.nats_once import connect_once
from services.cli.parser import build_parser, default_state_dir
from services.cli.up import predecessor, trim_log

ROLES: tuple[Role, ...] = get_args(Role)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that passes as a model where nobody loads it."""
    folder = tmp_path / "little"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def options(tmp_path: Path, **changes: object) -> UpOptions:
    return UpOptions(**({"state_dir": tmp_path / "state"} | changes))  # type: ignore[arg-type]


def test_every_replica_of_every_service_is_a_process_with_its_own_log(tmp_path: Path, folder: Path) -> None:
    replicas: dict[Role, int] = {"executor": 2, "gateway": 3}
    specs = service_specs(options(tmp_path, replicas=replicas), Model(name="m", folder=folder), "nats://x:1")
    names = [spec.name for _, spec in specs]
    assert names == [
        "executor-1", "executor-2", "trainer-1", "planner-1", "admission-1", "gateway-1", "gateway-2", "gateway-3"
    ]  # fmt: skip
    assert len({spec.log for _, spec in specs}) == len(specs)
    assert all(spec.command[1:] == ("-m", f"services.{role}") for role, spec in specs)
    assert {spec.id_variable for _, spec in specs} == {f"HEDDLE_{role.upper()}_INSTANCE_ID" for role in ROLES}
    assert set(START_ORDER) == set(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_services_know_every_setting_that_the_options_mean(tmp_path: Path, folder: Path, role: Role) -> None:
    everything = options(
        tmp_path,
        host="0.0.0.0",
        port=8123,
        dtype="float32",
        speculation="none",
        cohorts=2,
        finetune_sharing="temporal:64",
        threads=2,
        kv_cache_tokens=4096,
        prefix_cache=False,
        log_format="console",
        log_level="debug",
        replicas={"gateway": 2},
    )
    env = environment(everything, Model(name="m", folder=folder), "nats://x:1")
    module = importlib.import_module(f"services.{role}.config")
    config_type: type[ServiceConfig] = getattr(module, f"{role.capitalize()}Config")
    config = load_config(config_type, role, env)
    assert (config.nats_url, config.log_format, config.log_level) == ("nats://x:1", "console", "debug")
    expected: dict[str, dict[str, object]] = {
        "gateway": {"host": "0.0.0.0", "port": 8123, "reuse_port": True, "served_model_name": "m"},
        "planner": {"mode": "none"},
        "executor": {
            "dtype": "float32",
            "speculation": False,
            "cohorts": 2,
            "finetune_sharing": "temporal:64",
            "threads": 2,
            "kv_cache_tokens": 4096,
            "prefix_cache": False,
            "served_model_name": "m",
        },
    }
    for field, value in expected.get(role, {}).items():
        assert getattr(config, field) == value
    if hasattr(config, "model_dir"):
        assert Path(config.model_dir) == folder


def test_options_that_are_not_given_leave_the_services_own_defaults(tmp_path: Path, folder: Path) -> None:
    env = environment(options(tmp_path), Model(name="m", folder=folder), "nats://x:1")
    left = {"HEDDLE_EXECUTOR_DTYPE", "HEDDLE_EXECUTOR_THREADS", "HEDDLE_LOG_LEVEL", "HEDDLE_GATEWAY_REUSE_PORT"}
    assert not (left | {"HEDDLE_EXECUTOR_COHORTS", "HEDDLE_EXECUTOR_FINETUNE_SHARING"}) & set(env)
    assert env["HEDDLE_EXECUTOR_SPECULATION"] == "true"


def test_how_iterations_are_shared_is_checked_where_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    given = build_parser().parse_args(["up", "--cohorts", "2", "--finetune-sharing", "dynamic"])
    assert (given.cohorts, given.finetune_sharing) == (2, "dynamic")
    for option, value, rule in (("--cohorts", "3", "1 to 2"), ("--finetune-sharing", "temporal:0", "temporal:N")):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["up", option, value])
        complaint = capsys.readouterr().err
        assert option in complaint
        assert rule in complaint


def test_the_curl_line_survives_a_shell(tmp_path: Path) -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", "it's a model"))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == "it's a model"
    assert "Bearer $HEDDLE_API_KEY" in curl_line("http://x", "m", "HEDDLE_API_KEY")


def test_the_screen_has_all_that_a_user_needs(tmp_path: Path, folder: Path) -> None:
    everything = options(tmp_path, host="0.0.0.0", port=8123)
    text = screen(everything, Model(name="m", folder=folder), "nats://127.0.0.1:4222", [("gateway-1", "ab12")], 3.21)
    for part in (
        "http://127.0.0.1:8123/v1",
        "http://127.0.0.1:8123/docs",
        "nats://127.0.0.1:4222",
        "gateway-1 ab12",
        "3.2 s",
        "curl",
    ):
        assert part in text
    assert str(tmp_path / "state" / "logs") in text
    assert len(text.splitlines()) < 20


def test_the_state_directory_follows_the_environment() -> None:
    assert default_state_dir({"XDG_STATE_HOME": "/x"}) == Path("/x/heddle")
    assert default_state_dir({}) == Path.home() / ".local" / "state" / "heddle"


IDLE_SERVICE = """
import asyncio, importlib, os, sys
from common.bus import Bus
from common.config import ConfigError
from common.service import Vitals, main

class Idle:
    async def start(self, bus: Bus, tasks: asyncio.TaskGroup) -> None:
        if os.environ.get("BREAK") == role:
            raise {"config": ConfigError, "crash": LookupError}[os.environ["HOW"]]("broken\\non purpose")
    async def drain(self) -> None:
        with open(os.environ["STOPPED"], "a") as file:
            print(role, file=file)
    def vitals(self) -> Vitals:
        return Vitals()

role = sys.argv.pop(1)
config_type = getattr(importlib.import_module(f"services.{role}.config"), f"{role.capitalize()}Config")
main(role, config_type, lambda config: Idle())
"""
UP = f"""
import dataclasses, functools, sys
from services.cli import supervisor, up
from services.cli.__main__ import main

def idle(*arguments):
    return [(role, dataclasses.replace(spec, command=(sys.executable, "-c", {IDLE_SERVICE!r}, role)))
            for role, spec in real(*arguments)]

real, up.service_specs = up.service_specs, idle
up.Supervisor = functools.partial(supervisor.Supervisor, backoff=supervisor.Backoff(first_s=0.01))
main(sys.argv[1:])
"""


@contextmanager
def heddle_up(tmp_path: Path, folder: Path, *arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """`heddle up` on idle services; killed at the end if it still runs."""
    command = [sys.executable, "-c", UP, "up", "--model", str(folder), "--state-dir", str(tmp_path / "state")]
    process = subprocess.Popen(
        [*command, "--port", str(free_port()), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "STOPPED": str(tmp_path / "stopped"), **env},
    )
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the process prints, up to the line that has the text. Fails where output ends before."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in:\n{''.join(lines)}")


async def ping_all(nats_url: str) -> set[str]:
    """Names of the services that answer pings, as `nats micro ping` finds them."""
    client = await connect_once(nats_url)
    answers = [await client.request(f"$SRV.PING.heddle-{role}", b"", timeout=5) for role in ROLES]
    await client.close()
    return {json.loads(answer.data)["name"] for answer in answers}


def test_a_whole_life(tmp_path: Path, folder: Path) -> None:
    nats_port = free_port()
    with heddle_up(tmp_path, folder, "--planners", "2", "--nats-port", str(nats_port)) as process:
        shown = read_until(process, "Ctrl-C stops all of it")
        nats_url = next(line.split()[1] for line in shown.splitlines() if line.strip().startswith("NATS"))
        assert nats_url == f"nats://127.0.0.1:{nats_port}"
        assert asyncio.run(ping_all(nats_url)) == {f"heddle-{role}" for role in ROLES}
        with heddle_up(tmp_path, folder) as second:
            read_until(second, f"in use by process {process.pid}")
            assert second.wait(20) == 1
        process.send_signal(signal.SIGINT)
        rest = read_until(process, "stopped")
        assert process.wait(20) == 0
    assert "restarting" not in shown + rest
    stopped = (tmp_path / "stopped").read_text().split()
    assert stopped == ["gateway", "admission", "planner", "planner", "trainer", "executor"]
    logs = {path.name for path in (tmp_path / "state" / "logs").iterdir()}
    assert logs == {f"{role}-1.log" for role in ROLES} | {"planner-2.log", "nats.log"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the server's process in /proc")
def test_a_server_that_dies_is_back_on_its_port_with_what_it_stored(tmp_path: Path, folder: Path) -> None:
    with heddle_up(tmp_path, folder) as process:
        read_until(process, "Ctrl-C stops all of it")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (pid,) = [int(child) for child in children if Path(f"/proc/{child}/comm").read_text() == "nats-server\n"]
        os.kill(pid, signal.SIGKILL)
        assert "nats was killed by SIGKILL; restarting in 0.01 s" in read_until(process, "restarting")
        process.send_signal(signal.SIGTERM)
        read_until(process, "stopped")
        assert process.wait(20) == 0


def test_a_service_that_cannot_start_ends_it_all_with_its_last_words(tmp_path: Path, folder: Path) -> None:
    with heddle_up(tmp_path, folder, BREAK="trainer", HOW="crash") as process:
        shown = read_until(process, "on purpose")
        assert process.wait(20) == 1
    assert "trainer-1 exited with status 1, 3 times before it was ready" in shown


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"BREAK": "executor", "HOW": "config"}, "heddle: executor: broken on purpose (log: "),
        (
            {"HEDDLE_PLANNER_MODES": "none"},
            "heddle: planner: unknown setting HEDDLE_PLANNER_MODES; did you mean HEDDLE_PLANNER_MODE? (log: ",
        ),
        ({"HEDDLE_EXECUTOR_PAGE_SIZE": "many"}, "heddle: executor: HEDDLE_EXECUTOR_PAGE_SIZE='many' is not a valid int (log: "),
    ],
)
def test_a_configuration_that_cannot_work_ends_it_all_at_once_with_one_line(
    tmp_path: Path, folder: Path, env: dict[str, str], reason: str
) -> None:
    with heddle_up(tmp_path, folder, **env) as process:
        shown = read_until(process, "heddle: ")
        assert process.wait(20) == 1
    assert shown.splitlines()[-1].startswith(reason)
    assert "restarting" not in shown


def test_an_external_server_is_used_and_left_running(tmp_path: Path, folder: Path, nats_server: NatsServer) -> None:
    with heddle_up(tmp_path, folder, "--nats", nats_server.url) as process:
        assert nats_server.url in read_until(process, "Ctrl-C stops all of it")
        process.send_signal(signal.SIGTERM)
        read_until(process, "stopped")
        assert process.wait(20) == 0
    assert nats_server.answers()
    assert not (tmp_path / "state" / "nats").exists()


def test_one_planner_joins_and_takes_no_port(tmp_path: Path, folder: Path, nats_server: NatsServer) -> None:
    others = [word for role in ROLES if role != "planner" for word in (f"--{role}s", "0")]
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        with heddle_up(tmp_path, folder, "--nats", nats_server.url, *others, "--port", port) as process:
            shown = read_until(process, "Ctrl-C stops all of it")
            process.send_signal(signal.SIGTERM)
            read_until(process, "stopped")
            assert process.wait(20) == 0
    assert "planner-1" in shown
    assert not any(word in shown for word in ("curl", "/v1", "gateway-1"))
    assert (tmp_path / "stopped").read_text().split() == ["planner"]


def test_an_external_server_that_is_not_there_is_one_line(tmp_path: Path, folder: Path) -> None:
    with heddle_up(tmp_path, folder, "--nats", f"nats://127.0.0.1:{free_port()}") as process:
        read_until(process, "heddle: no NATS server answers at")
        assert process.wait(20) == 1


def test_two_run_side_by_side(tmp_path: Path, folder: Path) -> None:
    with heddle_up(tmp_path / "a", folder) as first, heddle_up(tmp_path / "b", folder) as second:
        shown = [read_until(process, "Ctrl-C stops all of it") for process in (first, second)]
        urls = [next(line.split()[1] for line in text.splitlines() if "NATS" in line) for text in shown]
        assert urls[0] != urls[1]


def test_a_long_log_is_moved_aside_while_its_child_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "executor-1.log"
    with log.open("ab", buffering=0) as child:
        child.write(b"x" * 100)
        trim_log(log, 100)
        assert not predecessor(log).exists()
        child.write(b"y")
        trim_log(log, 100)
        child.write(b"z")
    assert (predecessor(log).read_bytes(), log.read_bytes()) == (b"x" * 100 + b"y", b"z")


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with heddle_up(tmp_path, tmp_path / "nothing") as process:
        read_until(process, f"heddle: no model at {tmp_path / 'nothing'}")
        assert process.wait(20) == 1
