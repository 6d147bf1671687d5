"""Settings, and the gateway as a real process: start, signals, stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.bus import Bus
from common.chat import ChatTokenizer
from common.config import ConfigError, load_config
from common.nats_server import NatsServer, free_port
from common.service import loggable
from services.gateway.config import GatewayConfig
from tests.fakes import MODEL, REPLY, SAID, FakeAdmission, FakeExecutor, write_tiny_model
from tests.gateway_stage import Connect, running_gateway, until

BODY = {"model": MODEL, "prompt": "one", "max_tokens": 64}
WAIT_S = 10


def is_ok(health: Any) -> bool:
    """Whether GET /health says that all is well."""
    return bool(health == {"status": "ok"})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_settings(model_dir: Path) -> None:
    environ = {
        "HEDDLE_MODEL_DIR": str(model_dir),
        "HEDDLE_GATEWAY_API_KEY": "s3cret",
        "HEDDLE_GATEWAY_DEFAULT_TPOT_MS": "50",
        "HEDDLE_NATS_URL": "nats://me:hidden@host:4222",
    }
    config = load_config(GatewayConfig, "gateway", environ)
    assert (config.model_name, config.default_slo.tpot_ms, config.host) == (model_dir.name, 50.0, "127.0.0.1")
    logged = json.dumps(loggable(config))
    assert "s3cret" not in logged
    assert "hidden" not in logged
    for wrong in ({"MODEL_DIR": "/nowhere"}, {"PORT": "70000"}, {"MAX_N": "0"}, {"DEFAULT_TPOT_MS": "-1"}, {"TYPO": "1"}):
        ((name, value),) = wrong.items()
        with pytest.raises(ConfigError, match=name.lower() if name != "TYPO" else "TYPO"):
            load_config(GatewayConfig, "gateway", environ | {f"HEDDLE_GATEWAY_{name}": value})


async def test_a_huge_header_is_refused(connect: Connect, model_dir: Path) -> None:
    async with running_gateway(await connect(), model_dir, max_header_bytes=10_000) as gateway, httpx.AsyncClient() as http:
        assert (await http.get(f"{gateway.url}/live", headers={"x-filler": "x" * 5_000})).status_code == 200
        try:
            status = (await http.get(f"{gateway.url}/live", headers={"x-filler": "x" * 2_000_000})).status_code
        except httpx.TransportError:  # the answer may be lost when the connection is cut while the client still sends
            status = 400
        assert status == 400


@contextlib.asynccontextmanager
async def gateway_process(model_dir: Path, nats_url: str, url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m services.gateway` on the port of `url`, which answers when this yields."""
    environ = os.environ | {
        "HEDDLE_NATS_URL": nats_url,
        "HEDDLE_MODEL_DIR": str(model_dir),
        "HEDDLE_SERVED_MODEL_NAME": MODEL,
        "HEDDLE_GATEWAY_PORT": url.rpartition(":")[2],
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", env=environ, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(30), httpx.AsyncClient() as http:
            while True:
                with contextlib.suppress(httpx.ConnectError):
                    await http.get(f"{url}/live")
                    break
                await asyncio.sleep(0.02)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_process_that_is_told_to_stop_finishes_its_streams(bus: Bus, model_dir: Path, nats_server: NatsServer) -> None:
    executor = await FakeExecutor(bus, ChatTokenizer.load(model_dir).encode(REPLY), stall_at=2).start()
    await FakeAdmission(bus, executor).start()
    url = f"http://127.0.0.1:{free_port()}"
    async with gateway_process(model_dir, nats_server.url, url) as process, httpx.AsyncClient(base_url=url) as http:
        await until(http, "/health", is_ok)
        pinged = json.loads((await bus.client.request("$SRV.PING.heddle-gateway", b"")).data)
        assert pinged["name"] == "heddle-gateway"
        asking = asyncio.create_task(http.post("/v1/completions", json=BODY))
        await asyncio.wait_for(executor.stalled.wait(), WAIT_S)
        process.send_signal(signal.SIGTERM)
        await until(http, "/health", lambda health: health["status"] == "draining")
        executor.resume.set()
        assert (await asyncio.wait_for(asking, WAIT_S)).json()["choices"][0]["text"] == SAID
        _, log = await asyncio.wait_for(process.communicate(), WAIT_S)
        assert process.returncode == 0, log.decode()
        assert json.loads(log.decode().splitlines()[-1])["event"] == "service.stopped"
    await executor.kill()
