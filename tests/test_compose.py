"""compose.yaml, docker/Dockerfile and docker/nats.conf, without a Docker engine: schema, commands, settings, a real server."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
import importlib.util
import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml

from common.config import ServiceConfig, load_config
from common.messages import Role
from common.nats_server import MAX_PAYLOAD_BYTES, find_binary, free_port
from services.cli.parser import DEFAULT_MODEL, build_parser

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
NATS_CONF = ROOT / "docker" / "nats.conf"
ROLES: tuple[Role, ...] = get_args(Role)
OURS = (*ROLES, "executor-gpu")
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def interpolated(text: str, environ: dict[str, str]) -> dict[str, Any]:
    """The compose file with its variables replaced, as Docker Compose does it for ${NAME:-default}."""
    content = VARIABLE.sub(lambda match: environ.get(match[1]) or match[2] or "", text)
    loaded: dict[str, Any] = yaml.safe_load(content)
    return loaded


COMPOSE = interpolated((ROOT / "compose.yaml").read_text(), {})
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_the_file_follows_the_compose_specification() -> None:
    schemas = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    broken = COMPOSE | {"services": SERVICES | {"gateway": SERVICES["gateway"] | {"comand": "x"}}}
    assert not validator.is_valid(broken)


def test_it_runs_the_five_services_and_nats() -> None:
    assert set(SERVICES) == {"nats", "model", *OURS}


@pytest.mark.parametrize("name", OURS)
def test_commands_are_the_entry_points(name: str) -> None:
    role = name.removesuffix("-gpu")
    assert SERVICES[name]["command"] == ["python", "-m", f"services.{role}"]
    assert importlib.util.find_spec(f"services.{role}.__main__") is not None


@pytest.mark.parametrize("name", OURS)
def test_services_know_their_settings(name: str, tmp_path: Path) -> None:
    role: Any = name.removesuffix("-gpu")
    (tmp_path / "tokenizer.json").write_text("{}")
    environment = SERVICES[name]["environment"]
    config_type: type[ServiceConfig] = getattr(importlib.import_module(f"services.{role}.config"), f"{role.capitalize()}Config")
    config = load_config(config_type, role, environment | {"HEDDLE_MODEL_DIR": str(tmp_path)})
    assert config.nats_url == "nats://nats:4222"
    fields = {field.name for field in dataclasses.fields(config_type)}
    shared = {"nats_url", "model_dir", "served_model_name"}
    own = {variable.removeprefix("HEDDLE_").removeprefix(f"{role.upper()}_").lower() for variable in environment}
    assert own <= fields | shared


def test_every_shared_setting_is_some_service_s_field() -> None:
    known = set()
    for role in ROLES:
        config_type = getattr(importlib.import_module(f"services.{role}.config"), f"{role.capitalize()}Config")
        known |= {f"HEDDLE_{field.name.upper()}" for field in dataclasses.fields(config_type)}
    assert set(COMPOSE["x-service"]["environment"]) <= known


def test_the_model_is_converted_where_the_services_read_it() -> None:
    model = SERVICES["model"]
    arguments = build_parser().parse_args(model["command"][1:])
    assert model["command"][0] == "heddle"
    assert (arguments.command, arguments.model) == ("convert", DEFAULT_MODEL)
    for name in OURS:
        assert SERVICES[name]["environment"]["HEDDLE_MODEL_DIR"] == str(arguments.out)
        assert SERVICES[name]["depends_on"]["model"] == {"condition": "service_completed_successfully"}
    assert model["volumes"] == ["models:/models"]
    other = interpolated((ROOT / "compose.yaml").read_text(), {"HEDDLE_MODEL": "owner/name"})["services"]
    assert other["model"]["command"][2:] == ["owner/name", "--out", other["executor"]["environment"]["HEDDLE_MODEL_DIR"]]


@pytest.mark.parametrize("name", OURS)
def test_every_service_waits_for_nats_and_says_whether_it_is_ready(name: str) -> None:
    service = SERVICES[name]
    assert service["depends_on"]["nats"] == {"condition": "service_healthy"}
    check = service["healthcheck"]["test"]
    if name == "gateway":
        assert check[:3] == ["CMD", "python", "-c"]
        compile(check[3], "healthcheck", "exec")
    else:
        arguments = build_parser().parse_args(check[2:])
        assert (check[:2], arguments.command, arguments.role) == (["CMD", "heddle"], "health", name.removesuffix("-gpu"))


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_keeps_a_service_from_being_scaled(name: str) -> None:
    assert "container_name" not in SERVICES[name]
    for port in SERVICES[name].get("ports", []):
        address, published, target = port.split(":")
        first, last = published.split("-")
        assert (address, target) == ("127.0.0.1", "8000")
        assert int(last) - int(first) == 9


def test_only_the_gpu_executor_asks_for_a_device_and_only_in_its_profile() -> None:
    assert {name for name, service in SERVICES.items() if "deploy" in service} == {"executor-gpu"}
    assert {name for name, service in SERVICES.items() if "profiles" in service} == {"executor-gpu"}
    (device,) = SERVICES["executor-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert SERVICES["executor-gpu"]["environment"]["HEDDLE_EXECUTOR_DEVICE"] == "cuda"


def test_images_are_stages_of_the_dockerfile() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    for name in ("model", *OURS):
        build = SERVICES[name]["build"]
        assert build["target"] in stages
        assert (ROOT / build["dockerfile"]).is_file()
        assert SERVICES[name]["image"] == f"heddle:{build['target']}"
        assert set(build["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))


def test_the_dockerfile_copies_what_is_there_and_ends_without_root() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored
    stages = DOCKERFILE.split("\nFROM ")
    users = {stage.split(" AS ")[1].split()[0]: re.findall(r"^USER (\w+)$", stage, re.MULTILINE) for stage in stages[1:]}
    assert users == {"build": [], "runtime": ["heddle"], "gpu": ["root", "heddle"], "cpu": []}
    assert "://" not in DOCKERFILE


@pytest.fixture
def docker_nats(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A server that runs docker/nats.conf, on free ports and with its store in the test's folder: (client port, http port)."""
    port, http_port = free_port(), free_port()
    config = tmp_path / "nats.conf"
    config.write_text(NATS_CONF.read_text().replace("/data", str(tmp_path / "data")))
    command = [find_binary(), "-c", str(config), "-p", str(port), "-m", str(http_port)]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    yield port, http_port
    server.terminate()
    server.wait()


def get(url: str, timeout_s: float = 10.0) -> bytes:
    """The body, as soon as the server answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1) as response:
                body: bytes = response.read()
                return body
        except OSError:
            if time.monotonic() > deadline:
                raise


def test_the_servers_limits_are_those_of_heddle_up_and_its_health_check_answers(docker_nats: tuple[int, int]) -> None:
    port, http_port = docker_nats
    url = SERVICES["nats"]["healthcheck"]["test"][-1].replace("8222", str(http_port))
    assert json.loads(get(url)) == {"status": "ok"}
    with socket.create_connection(("127.0.0.1", port)) as connection:
        info = json.loads(connection.makefile().readline().removeprefix("INFO "))
    assert info["max_payload"] == MAX_PAYLOAD_BYTES
    assert info["jetstream"] is True
    settings = json.loads(get(f"http://127.0.0.1:{http_port}/jsz"))["config"]
    assert settings["sync_always"] is True


def test_the_servers_store_is_the_volume() -> None:
    assert "store_dir: /data" in NATS_CONF.read_text()
    assert "nats:/data" in SERVICES["nats"]["volumes"]
    assert f"./{os.path.relpath(NATS_CONF, ROOT)}:/etc/nats/nats-server.conf:ro" in SERVICES["nats"]["volumes"]
    image, version = SERVICES["nats"]["image"].split(":")
    assert image == "nats"
    assert tuple(map(int, version.removesuffix("-alpine").split("."))) >= (2, 12)
