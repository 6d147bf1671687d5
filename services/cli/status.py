"""`heddle status`: asks a gateway what runs and shows it. Knows HTTP and the shape of the answer, nothing of the bus."""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

REFUSALS = (401, 403)
"""Statuses of a gateway that is there, and has not been given its key."""
SHOWN = (
    "executors", "in_flight", "live_streams", "num_running", "num_waiting", "free_pages", "pages_in_use", "sequences",
    "mean_answer_ms", "jobs", "jobs_running", "jobs_queued", "tokens_per_second",
)  # fmt: skip
"""Of a service's load in the table; all of it is in --json."""


class StatusError(RuntimeError):
    """The gateway cannot be reached or does not answer as one."""


class ServiceStatus(msgspec.Struct, frozen=True):
    """One running service."""

    name: str
    id: str
    state: str
    url: str = ""
    load: dict[str, Any] = {}


class Status(msgspec.Struct, frozen=True):
    """The body of GET /status."""

    nats_url: str
    model: str
    services: list[ServiceStatus]


def fetch(url: str, api_key: str | None = None, timeout_s: float = 5.0) -> tuple[Status, dict[str, Any]]:
    """The gateway's status, validated and as it came. Raises StatusError."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url.rstrip('/')}/status", headers=headers, timeout=timeout_s)
        if response.status_code in REFUSALS:
            raise StatusError(_refused(url, api_key, response.status_code))
        body = response.raise_for_status().json()
        return msgspec.convert(body, Status), body
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise StatusError(f"no Heddle gateway answers at {url}: {error or type(error).__name__}") from error


def _refused(url: str, api_key: str | None, status: int) -> str:
    fault = "does not accept this API key" if api_key else "asks for an API key"
    return f"the gateway at {url} {fault} (status {status}): give its key with --api-key or in HEDDLE_API_KEY"


def show(url: str, api_key: str | None, as_json: bool) -> None:
    """Print the status, as a table or as JSON. Raises StatusError."""
    status, body = fetch(url, api_key)
    if as_json:
        print(json.dumps(body, indent=2))
        return
    table = Table("service", "id", "state", "url", "load", box=None, pad_edge=False, header_style="bold")
    for service in status.services:
        table.add_row(service.name, service.id, service.state, service.url, summary(service.load))
    console = wide_console()
    console.print(f"[bold]model[/bold]  {status.model}\n[bold]NATS[/bold]   {status.nats_url}\n")
    console.print(table)


def wide_console() -> Console:
    """As wide as the terminal; where there is none, wide enough for one line per row."""
    return Console() if sys.stdout.isatty() else Console(width=1000)


def summary(load: dict[str, Any]) -> str:
    """What there is of `SHOWN`, in one line."""
    return "  ".join(f"{key}={_short(load[key])}" for key in SHOWN if isinstance(load.get(key), int | float))


def _short(value: float) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
