"""What `heddle up` runs: its options, the processes they mean with their environment, and the screen. Pure."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.messages import Role
from services.cli.parser import DEFAULT_MODEL
from services.cli.supervisor import ChildSpec

START_ORDER: tuple[Role, ...] = ("executor", "trainer", "planner", "admission", "gateway")
"""Slowest first; stopping goes the other way, so that what takes new work ends before what does it."""
GATEWAY_ROLE: Role = "gateway"


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """The options of `heddle up`. None means: the service's own default."""

    state_dir: Path
    host: str = "127.0.0.1"
    port: int = 8000
    model: str = DEFAULT_MODEL
    served_model_name: str | None = None
    dtype: str | None = None
    draft: str = "auto"
    speculation: str = "heddle"
    cohorts: int | None = None
    finetune_sharing: str | None = None
    threads: int | None = None
    kv_cache_tokens: int | None = None
    prefix_cache: bool = True
    nats: str | None = None
    nats_port: int | None = None
    """Where our own NATS server listens; None: wherever there is room."""
    key_variable: str | None = None
    """The environment variable that holds the gateway's API key; None: no key."""
    tensorboard_dir: Path | None = None
    """Where finetuning jobs' metrics go as they come; None: beside the logs."""
    log_format: str | None = None
    log_level: str | None = None
    replicas: Mapping[Role, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the gateways."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"

    @property
    def has_gateway(self) -> bool:
        """Whether any is started here; only they listen on `port`."""
        return self.replicas.get(GATEWAY_ROLE, 1) > 0

    @property
    def has_planner(self) -> bool:
        """Whether any is started here; only they read drafters."""
        return self.replicas.get("planner", 1) > 0

    @property
    def log_dir(self) -> Path:
        """Each child's log is in here."""
        return self.state_dir / "logs"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model to serve: what clients call it, and the folder to read."""

    name: str
    folder: Path


def service_specs(options: UpOptions, model: Model, nats_url: str) -> list[tuple[Role, ChildSpec]]:
    """One spec per replica of every service, in START_ORDER."""
    env = environment(options, model, nats_url)
    return [
        (
            role,
            ChildSpec(
                name=f"{role}-{number}",
                command=(sys.executable, "-m", f"services.{role}"),
                log=options.log_dir / f"{role}-{number}.log",
                env=env,
                id_variable=f"HEDDLE_{role.upper()}_INSTANCE_ID",
            ),
        )
        for role in START_ORDER
        for number in range(1, options.replicas.get(role, 1) + 1)
    ]


def environment(options: UpOptions, model: Model, nats_url: str) -> dict[str, str]:
    """The settings that the options mean; a service reads its own and ignores the others'."""
    settings = {
        "HEDDLE_NATS_URL": nats_url,
        "HEDDLE_MODEL_DIR": str(model.folder),
        "HEDDLE_SERVED_MODEL_NAME": model.name,
        "HEDDLE_LOG_FORMAT": options.log_format,
        "HEDDLE_LOG_LEVEL": options.log_level,
        "HEDDLE_GATEWAY_HOST": options.host,
        "HEDDLE_GATEWAY_PORT": options.port,
        "HEDDLE_GATEWAY_REUSE_PORT": "true" if options.replicas.get(GATEWAY_ROLE, 1) > 1 else None,
        "HEDDLE_TRAINER_TENSORBOARD_DIR": options.tensorboard_dir or options.state_dir / "tensorboard",
        "HEDDLE_PLANNER_MODE": options.speculation,
        "HEDDLE_DRAFT": options.draft,
        "HEDDLE_EXECUTOR_SPECULATION": "false" if options.speculation == "none" else "true",
        "HEDDLE_EXECUTOR_COHORTS": options.cohorts,
        "HEDDLE_EXECUTOR_FINETUNE_SHARING": options.finetune_sharing,
        "HEDDLE_EXECUTOR_DTYPE": options.dtype,
        "HEDDLE_EXECUTOR_THREADS": options.threads,
        "HEDDLE_EXECUTOR_KV_CACHE_TOKENS": options.kv_cache_tokens,
        "HEDDLE_EXECUTOR_PREFIX_CACHE": None if options.prefix_cache else "false",
    }
    return {variable: str(value) for variable, value in settings.items() if value is not None}


def curl_line(url: str, model: str, key_variable: str | None = None) -> str:
    """A command that works when pasted into a shell; with a key, one where that variable is set."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "What is a loom?"}]})
    quoted = body.replace("'", "'\\''")
    key = f'-H "authorization: Bearer ${key_variable}" ' if key_variable else ""
    return f"curl {url}/v1/chat/completions {key}-H 'content-type: application/json' -d '{quoted}'"


def screen(options: UpOptions, model: Model, nats_url: str, services: Sequence[tuple[str, str]], elapsed_s: float) -> str:
    """All that a user needs to go on, when everything is ready; `services` are (name, instance id)."""
    rows = [("API", f"{options.url}/v1"), ("docs", f"{options.url}/docs")] if options.has_gateway else []
    rows += [
        ("NATS", nats_url),
        ("model", f"{model.name}  ({model.folder})"),
        ("services", "  ".join(f"{name} {instance_id}" for name, instance_id in services)),
        ("logs", str(options.log_dir)),
    ]
    lines = [f"Heddle is up, {elapsed_s:.1f} s after its start.", ""]
    lines += [f"  {title:<9} {text}" for title, text in rows]
    if options.has_gateway:
        lines += ["", "Try it:", f"  {curl_line(options.url, model.name, options.key_variable)}"]
    lines += ["", "Ctrl-C stops all of it."]
    return "\n".join(lines)
