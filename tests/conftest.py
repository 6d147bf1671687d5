"""Fixtures: a fresh NATS server per test, buses on it, unique ids."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from common.bus import Bus
from common.nats_server import NatsServer

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which reads it then and there


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A fresh server with JetStream in the test's folder; ready in a few ms."""
    server = NatsServer(tmp_path / "nats", sync_always=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def connect(nats_server: NatsServer) -> AsyncIterator[Callable[[], Awaitable[Bus]]]:
    """A function that opens one more bus connection; all are closed after the test."""
    buses: list[Bus] = []

    async def open_bus() -> Bus:
        buses.append(await Bus.connect(nats_server.url, "test"))
        return buses[-1]

    yield open_bus
    for bus in buses:
        await bus.drain()


@pytest.fixture
async def bus(connect: Callable[[], Awaitable[Bus]]) -> Bus:
    """A bus on the test's own server."""
    return await connect()


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: HEDDLE_TEST_MODEL_DIR, else converted once into the user's cache."""
    if named := os.environ.get("HEDDLE_TEST_MODEL_DIR"):
        return Path(named)
    command = [sys.executable, "-m", "services.cli", "convert"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Path(printed.splitlines()[-1])
