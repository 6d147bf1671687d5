"""`heddle finetune`: uploads a dataset to a gateway, starts a job, and follows it. Knows OpenAI's API over HTTP, no bus."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.cli.status import fetch

POLL_S = 0.5
TIMEOUT_S = 120.0
MAX_OUTAGE_S = 60.0
"""A gateway that restarts is waited for so long."""
ENDED = ("succeeded", "failed", "cancelled")
PAGE = 100
DRAFTER_FILES = ("config.json", "drafter.safetensors", "README.md")
"""A drafter's folder."""


class FinetuneError(RuntimeError):
    """The job cannot be started or followed, or did not succeed; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """What the command line asks for; None is left to the trainer's default."""

    data: Path
    validation: Path | None
    model: str | None
    suffix: str | None
    seed: int | None
    epochs: int | None
    batch_size: int | None
    lora: dict[str, Any]
    wait: bool
    drafter: dict[str, Any] | None = None
    """Hyperparameters of a distillation, which has no `lora`."""
    out: Path | None = None
    """Where the drafter's folder goes when the job has succeeded, which is waited for."""
    url: str
    api_key: str | None


def finetune(options: FinetuneOptions) -> None:
    """Start the job, and with `wait` follow it to its end. Raises FinetuneError or StatusError."""
    for path in (options.data, options.validation):
        if path is not None and not path.is_file():
            raise FinetuneError(f"{path} is a folder, not a JSONL file" if path.is_dir() else f"there is no file {path}")
    if options.out is not None and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise FinetuneError(f"{options.out} is not an empty folder")
    model = options.model or fetch(options.url, options.api_key)[0].model
    headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    with httpx.Client(base_url=options.url.rstrip("/"), headers=headers, timeout=TIMEOUT_S) as client:
        gateway = Gateway(client)
        files = {"training_file": gateway.upload(options.data)}
        if options.validation is not None:
            files["validation_file"] = gateway.upload(options.validation)
        job = gateway.create(body(options, model, files))
        print(f"job {job['id']}: {options.data.name}, {model}", flush=True)
        if not options.wait and options.out is None:
            return
        try:
            job = follow(gateway, job["id"])
        except KeyboardInterrupt:
            print(f"the job goes on; POST {options.url}/v1/fine_tuning/jobs/{job['id']}/cancel ends it", file=sys.stderr)
            raise
        if job["status"] != "succeeded":
            raise FinetuneError(f"the job {job['status']}" + (f": {job['error']['message']}" if job.get("error") else ""))
        print(outcome(options, gateway, job))


def outcome(options: FinetuneOptions, gateway: Gateway, job: dict[str, Any]) -> str:
    """What came of a job that succeeded; a drafter's folder is written."""
    if options.drafter is None:
        return f"{job['fine_tuned_model']}: served as a model, {job['trained_tokens']} tokens trained"
    if options.out is None:
        return f"a drafter: its folder is among the job's files, {', '.join(job['result_files'])}"
    options.out.mkdir(parents=True, exist_ok=True)
    for file_id in job["result_files"]:
        if (name := gateway.filename(file_id)) in DRAFTER_FILES:
            (options.out / name).write_bytes(gateway.content(file_id))
    return f"a drafter, in {options.out}: heddle up --draft ngram,features:{options.out}"


def body(options: FinetuneOptions, model: str, files: dict[str, str]) -> dict[str, Any]:
    """The request that creates the job."""
    hyperparameters = {"n_epochs": options.epochs, "batch_size": options.batch_size, **(options.drafter or {})}
    method = "supervised" if options.drafter is None else "distillation"
    asked = {
        "model": model,
        **files,
        "suffix": options.suffix,
        "seed": options.seed,
        "method": {"type": method, method: {"hyperparameters": _given(hyperparameters)}},
        "lora": _given(options.lora) if options.drafter is None else None,
    }
    return _given(asked)


class Gateway:
    """The calls that the command makes. They raise FinetuneError in the gateway's own words."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def upload(self, path: Path) -> str:
        """Store a dataset; returns its id."""
        with path.open("rb") as file:
            answer = self._ask("POST", "/v1/files", files={"file": (path.name, file)}, data={"purpose": "fine-tune"})
        return str(answer["id"])

    def create(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start a job."""
        return self._ask("POST", "/v1/fine_tuning/jobs", json=request)

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as it is now."""
        return self._ask("GET", f"/v1/fine_tuning/jobs/{job_id}")

    def filename(self, file_id: str) -> str:
        """What a file is called."""
        return str(self._ask("GET", f"/v1/files/{file_id}")["filename"])

    def content(self, file_id: str) -> bytes:
        """A file's bytes."""
        response = self._client.get(f"/v1/files/{file_id}/content")
        if response.is_error:
            raise FinetuneError(f"the file {file_id} cannot be had: status {response.status_code}")
        return response.content

    def events_since(self, job_id: str, last_id: str | None) -> list[dict[str, Any]]:
        """The job's events behind that one, oldest first."""
        found: list[dict[str, Any]] = []
        after = ""
        while True:
            page = self._ask("GET", f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": PAGE, "after": after})
            for event in page["data"]:
                if event["id"] == last_id:
                    return found[::-1]
                found.append(event)
            if not page["has_more"] or not page["data"]:
                return found[::-1]
            after = page["data"][-1]["id"]

    def _ask(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        response = self._client.request(method, path, **arguments)
        if response.is_server_error:
            response.raise_for_status()
        try:
            answer: dict[str, Any] = response.json()
        except ValueError as error:
            raise FinetuneError(f"no Heddle gateway answers at {self._client.base_url}") from error
        if response.is_error:
            raise FinetuneError(str(answer.get("error", {}).get("message", f"status {response.status_code}")))
        return answer


def follow(gateway: Gateway, job_id: str) -> dict[str, Any]:
    """Show the job until it ends: a bar on a terminal, else its events line by line. Returns the job as it ended."""
    job: dict[str, Any] = {}
    if sys.stdout.isatty():
        with _bar() as progress:
            task = progress.add_task("", total=None, loss="", pace="", left="")
            for job, events in watch(gateway, job_id):
                progress.update(task, **bar_fields(job, events, time.time()))
        return job
    for state, events in watch(gateway, job_id):
        job = state
        for event in events:
            print(line(job, event, time.time()), flush=True)
    return job


def watch(
    gateway: Gateway, job_id: str, sleep: Callable[[float], None] = time.sleep
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The job and its new events, again and again until it has ended. A gateway that is away for a while is waited for."""
    last_id, answered_at = None, time.monotonic()
    while True:
        try:
            job = gateway.job(job_id)
            events = gateway.events_since(job_id, last_id)
        except httpx.HTTPError as error:
            if time.monotonic() - answered_at > MAX_OUTAGE_S:
                raise FinetuneError(f"the gateway does not answer any more: {error or type(error).__name__}") from error
            sleep(POLL_S)
            continue
        answered_at = time.monotonic()
        last_id = events[-1]["id"] if events else last_id
        yield job, events
        if job["status"] in ENDED:
            return
        sleep(POLL_S)


def bar_fields(job: dict[str, Any], events: list[dict[str, Any]], now: float) -> dict[str, Any]:
    """What the bar shows of the job, and of the newest step among the events if there is one."""
    fields: dict[str, Any] = {"description": job["status"], "completed": job["step"], "total": job["total_steps"] or None}
    finish = job.get("estimated_finish")
    fields["left"] = f"{_clock(max(0.0, finish - now))} left" if finish and job["status"] not in ENDED else ""
    steps = [event["data"] for event in events if event.get("type") == "metrics"]
    if steps:
        newest = steps[-1]
        fields["completed"] = max(job["step"], int(newest["step"]))
        fields["loss"] = f"loss {newest['train_loss']:.4f}"
        fields["pace"] = f"{newest['tokens_per_second']:,.0f} tokens/s"
    return fields


def line(job: dict[str, Any], event: dict[str, Any], now: float) -> str:
    """An event's message, a step's with tokens per second and what is left."""
    if event.get("type") != "metrics":
        return str(event["message"])
    fields = bar_fields(job, [event], now)
    return ", ".join(filter(None, (event["message"], fields["pace"], fields["left"])))


def _bar() -> Progress:
    fields = [TextColumn(f"{{task.fields[{name}]}}") for name in ("loss", "pace", "left")]
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *fields, console=Console())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
