"""What `heddle up` refuses before it starts anything."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import get_args

import pytest

from common.messages import Role
from services.cli.__main__ import main
from services.cli.layout import UpOptions
from services.cli.models import ModelError
from services.cli.preflight import UpError, check_drafters, check_port, check_replicas, locked

OTHERS = [word for role in get_args(Role) if role != "planner" for word in (f"--{role}s", "0")]


def test_a_port_in_use_is_noticed_before_anything_starts() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UpError, match=rf"port {port} on 127\.0\.0\.1 cannot be used .*--port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_state_directory_has_one_owner(tmp_path: Path) -> None:
    with locked(tmp_path / "state"):
        with pytest.raises(UpError, match=rf"in use by process {os.getpid()}.*--state-dir"), locked(tmp_path / "state"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "state"):
        pass


def test_a_state_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UpError, match="cannot be used"), locked(tmp_path / "file" / "state"):
        pass


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--planners", "0"], "--planners 0 needs --nats URL"),
        (["--nats", "nats://127.0.0.1:1", "--planners", "0", *OTHERS], "there is nothing to start"),
        (["--draft", "ngram,features:nowhere"], "nowhere/config.json: No such file or directory"),
        (["--draft", "model:nowhere"], "nowhere has no config.json"),
    ],
)
def test_what_cannot_be_started_is_refused_before_anything_is(tmp_path: Path, arguments: list[str], reason: str) -> None:
    with pytest.raises(SystemExit, match=reason):
        main(["up", "--state-dir", str(tmp_path / "state"), *arguments])
    assert not (tmp_path / "state").exists()


def test_numbers_that_are_not_given_mean_one_of_each(tmp_path: Path) -> None:
    check_replicas({}, None)
    assert UpOptions(state_dir=tmp_path).has_planner
    assert not UpOptions(state_dir=tmp_path, replicas={"planner": 0}).has_planner, "whose drafters are then not read"


def test_a_drafters_weights_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": "heddle-features-1"}')
    (tmp_path / "drafter.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"drafter\.safetensors is not a safetensors file"):
        check_drafters(f"ngram,features:{tmp_path}")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UpError, match="has the format None, not heddle-features-1"):
        check_drafters(f"features:{tmp_path}")
    check_drafters("auto")
