"""The trainer as a process, and its settings."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from common.bus import Bus
from common.nats_server import NatsServer
from services.trainer.config import TrainerConfig
from tests.trainer_fakes import write_model_dir


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_model_dir(tmp_path / "model")


async def test_a_config_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_dir must be a folder with tokenizer\.json"):
        TrainerConfig(model_dir=tmp_path)
    with pytest.raises(ValueError, match="lease_s must be at least"):
        TrainerConfig(model_dir=write_model_dir(tmp_path), lease_s=1.0, renew_s=0.5)


async def test_the_process_joins_the_bus_and_stops_on_sigterm(nats_server: NatsServer, bus: Bus, model_dir: Path) -> None:
    environ = {
        **os.environ,
        "HEDDLE_NATS_URL": nats_server.url,
        "HEDDLE_MODEL_DIR": str(model_dir),
        "HEDDLE_HEARTBEAT_S": "0.05",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.trainer", env=environ, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    async with asyncio.timeout(30):
        log = b""
        while b"service.ready" not in log:
            line = await process.stderr.readline()
            assert line, log
            log += line
        answer = msgspec.json.decode((await bus.client.request("$SRV.PING", b"")).data)
        assert answer["name"] == "heddle-trainer"
        process.send_signal(signal.SIGTERM)
        log += await process.stderr.read()
        assert await process.wait() == 0
    assert b"service.stopped" in log
    assert b"Traceback" not in log


async def test_a_process_without_model_says_so(nats_server: NatsServer) -> None:
    environ = {**os.environ, "HEDDLE_NATS_URL": nats_server.url}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.trainer", env=environ, stderr=asyncio.subprocess.PIPE
    )
    _, log = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode != 0
    assert b"model_dir must be a folder with tokenizer.json" in log
