"""`heddle status` and the command line itself."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from common.nats_server import NatsServer
from services.cli.__main__ import main
from services.cli.status import StatusError, fetch, summary

BODY = {
    "nats_url": "nats://127.0.0.1:4222",
    "model": "little",
    "services": [
        {"name": "gateway", "id": "g1", "state": "ready", "url": "http://127.0.0.1:8000", "load": {"live_streams": 2}},
        {
            "name": "executor",
            "id": "e1",
            "state": "starting",
            "load": {"jobs": 7, "mean_answer_ms": 12.3456, "adapters": [], "iterations": 9},
        },
    ],
}


@contextlib.contextmanager
def gateway(status: int, body: str, key: str | None = None) -> Iterator[str]:
    """An HTTP server that gives one answer to GET /status, and 401 without the key."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            refused = key is not None and self.headers["authorization"] != f"Bearer {key}"
            self.send_response(401 if refused else status if self.path == "/status" else 404)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_table_names_every_service_with_state_and_load(capsys: pytest.CaptureFixture[str]) -> None:
    with gateway(200, json.dumps(BODY)) as url:
        main(["status", "--url", url + "/"])
    printed = capsys.readouterr().out
    assert "nats://127.0.0.1:4222" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["gateway", "g1", "ready", "http://127.0.0.1:8000", "live_streams=2"] in lines
    assert ["executor", "e1", "starting", "mean_answer_ms=12.346", "jobs=7"] in lines


def test_json_is_passed_on_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with gateway(200, json.dumps(BODY | {"more": [1]})) as url:
        main(["status", "--json", "--url", url])
    assert json.loads(capsys.readouterr().out) == BODY | {"more": [1]}


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with gateway(200, json.dumps(BODY | {"more": ["x" * 100] * 10_000})) as url:
        command = f"{sys.executable} -m services.cli status --json --url {url} | head -1"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False)
    assert (result.stdout, result.stderr) == ("{\n", "")


def test_a_gateway_with_a_key_is_asked_with_it() -> None:
    with gateway(200, json.dumps(BODY), key="secret") as url:
        assert fetch(url, "secret")[0].model == "little"
        with pytest.raises(StatusError, match=r"does not accept this API key \(status 401\)"):
            fetch(url, "wrong")
        with pytest.raises(StatusError, match=r"asks for an API key .* --api-key or in HEDDLE_API_KEY"):
            fetch(url)


@pytest.mark.parametrize(("status", "body"), [(500, "{}"), (200, "not json"), (200, "{}"), (200, '{"services": 1}')])
def test_what_does_not_answer_as_a_gateway_is_refused(status: int, body: str) -> None:
    with gateway(status, body) as url, pytest.raises(StatusError, match=url):
        fetch(url)


@pytest.mark.parametrize("command", [["status"], ["adapters", "list"]])
def test_without_a_gateway_commands_end_with_one_line_and_status_1(command: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--url", "http://127.0.0.1:9"])
    assert stopped.value.code == "heddle: no Heddle gateway answers at http://127.0.0.1:9: [Errno 111] Connection refused"


def test_adapters_are_found_through_the_gateway(nats_server: NatsServer, capsys: pytest.CaptureFixture[str]) -> None:
    with gateway(200, json.dumps(BODY | {"nats_url": nats_server.url})) as url:
        main(["adapters", "list", "--url", url])
    assert capsys.readouterr().out == "no adapters yet\n"


def test_health_ends_with_status_1_where_nothing_runs(nats_server: NatsServer) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["health", "planner", "--nats", nats_server.url])
    assert str(stopped.value.code).startswith("heddle: no planner answers pings")


def test_summary_leaves_counters_lists_and_tables_to_json() -> None:
    load = {"iterations": 9, "jobs": [1], "num_running": 1, "sequences": {"d": 1}, "mean_answer_ms": 0.123456}
    assert summary(load) == "num_running=1  mean_answer_ms=0.12346"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for command in ("up", "status", "convert", "adapters", "health", "version"):
        assert f"    {command} " in printed


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["upp"],
        ["up", "--nats", "x", "--nats-port", "1"],
        ["up", "--port", "0"],
        ["up", "--executors", "x"],
        ["up", "--dtype", "int4"],
    ],
)
def test_a_wrong_command_line_is_status_2_and_says_what_is_wrong_first(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    fault, hint = capsys.readouterr().err.splitlines()
    assert fault.startswith("heddle up: argument --" if arguments[:1] == ["up"] else "heddle: ")
    assert "--help" in hint


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_version_is_printed(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main([argument])
    assert capsys.readouterr().out.startswith("heddle 0.")
