"""/v1/fine_tuning/jobs: forwards to the trainer and gives its answers OpenAI's shape. Knows shapes, not training."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from common import subjects
from common.bus import Bus, BusTimeoutError, NoServiceError, RemoteError, TooLargeError
from common.messages import CheckpointPage, CreateJob, EventPage, FineTuningJob, JobPage, JobQuery
from services.gateway.docs import json_body
from services.gateway.errors import ApiError, from_reply, unavailable
from services.gateway.http_errors import json_response
from services.gateway.openai_api import decode_json

T = TypeVar("T")

ENDED = frozenset({"succeeded", "failed", "cancelled"})
MAX_PAGE = 100
"""The trainer gives no more at once; clients that ask for more see `has_more`."""
TIMEOUT_S = 30.0
"""Creating a job reads and checks its training file."""

_CREATE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["model", "training_file"],
    "properties": {
        "model": {"type": "string"},
        "training_file": {"type": "string", "description": "Id of an uploaded chat JSONL."},
        "validation_file": {"type": "string", "description": "Id of a chat JSONL, scored after each epoch."},
        "suffix": {
            "type": "string",
            "maxLength": 64,
            "description": "In the model's name, where what is no letter, digit, _, . or - becomes a dash.",
        },
        "seed": {"type": "integer"},
        "hyperparameters": {"type": "object", "description": "n_epochs, batch_size, learning_rate_multiplier, ..."},
        "method": {
            "type": "object",
            "description": "{type: supervised, supervised: {hyperparameters}}, or type distillation: a drafter is trained,"
            " with the hyperparameters learning_rate, vocabulary_size and num_steps besides.",
        },
        "metadata": {"type": "object"},
        "lora": {
            "type": "object",
            "description": "method (lora, rslora, ia3, bottleneck), rank, alpha, dropout, target_modules, learning_rate, ...",
        },
    },
}


class Trainer:
    """The trainer as seen over the bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def ask(self, verb: str, message: CreateJob | JobQuery, expected: type[T]) -> T:
        """Raises ApiError: the trainer's own, or 503 when there is none."""
        try:
            return await self._bus.request(subjects.finetune(verb), message, expected, timeout_s=TIMEOUT_S)
        except RemoteError as error:
            raise from_reply(error.reply) from error
        except NoServiceError as error:
            raise unavailable("No trainer is running.", "no_trainer") from error
        except BusTimeoutError as error:
            raise unavailable("The trainer did not answer in time.", "trainer_timeout") from error
        except TooLargeError as error:
            raise ApiError(413, "The body is too large.", code="request_too_large") from error

    async def user_of(self, file_id: str) -> str | None:
        """Id of a job that has not ended and trains on this file. Raises ApiError, also 503 when no trainer can tell."""
        after, has_more = "", True
        while has_more:
            page = await self.ask("list", JobQuery(after=after, limit=MAX_PAGE), JobPage)
            for job in page.data:
                if file_id in (job.training_file, job.validation_file) and job.status not in ENDED:
                    return job.id
            after, has_more = page.data[-1].id if page.data else "", page.has_more and bool(page.data)
        return None


def finetuning_routes(trainer: Trainer) -> APIRouter:
    """OpenAI's fine-tuning API."""
    router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"])

    @router.post("", summary="Start a job", openapi_extra={"requestBody": json_body(_CREATE_SCHEMA)})
    async def create(request: Request) -> Response:
        """Trains a LoRA adapter on an uploaded file; when it has succeeded, `fine_tuned_model` is served.

        A distillation trains a drafter: its folder's files are among `result_files`.
        """
        body = decode_json(await request.body(), dict[str, Any])
        return json_response(job_object(await trainer.ask("create", CreateJob(body=body), FineTuningJob)))

    @router.get("", summary="List jobs")
    async def listing(after: str = "", limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Response:
        """Newest first."""
        found = await trainer.ask("list", JobQuery(after=after, limit=limit), JobPage)
        return json_response(_page([job_object(job) for job in found.data], found.has_more))

    @router.get("/{job_id}", summary="One job")
    async def get(job_id: str) -> Response:
        """Status, progress and the name of its model."""
        return json_response(job_object(await trainer.ask("get", JobQuery(job_id=job_id), FineTuningJob)))

    @router.post("/{job_id}/{verb}", summary="Cancel, pause or resume a job")
    async def change(job_id: str, verb: str) -> Response:
        """`verb` is cancel, pause or resume."""
        if verb not in ("cancel", "pause", "resume"):
            raise ApiError(404, f"There is no route /v1/fine_tuning/jobs/{job_id}/{verb}.", code="not_found")
        return json_response(job_object(await trainer.ask(verb, JobQuery(job_id=job_id), FineTuningJob)))

    @router.get("/{job_id}/events", summary="A job's events")
    async def events(job_id: str, after: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> Response:
        """Newest first, at most 100 at once; `type` metrics has the training loss in `data`."""
        query = JobQuery(job_id=job_id, after=after, limit=min(limit, MAX_PAGE))
        found = await trainer.ask("events", query, EventPage)
        return json_response(_page([_object(event, "fine_tuning.job.event") for event in found.data], found.has_more))

    @router.get("/{job_id}/checkpoints", summary="A job's checkpoints")
    async def checkpoints(job_id: str, after: str = "", limit: Annotated[int, Query(ge=1, le=100)] = 10) -> Response:
        """Newest first."""
        found = await trainer.ask("checkpoints", JobQuery(job_id=job_id, after=after, limit=limit), CheckpointPage)
        data = [_object(checkpoint, "fine_tuning.job.checkpoint") for checkpoint in found.data]
        return json_response(_page(data, found.has_more))

    return router


def job_object(job: FineTuningJob) -> dict[str, Any]:
    """The job in OpenAI's shape, with our `lora`, `step` and `total_steps` beside it."""
    method = {"type": job.method, job.method: {"hyperparameters": job.hyperparameters}}
    return _object(job, "fine_tuning.job") | {"organization_id": "", "integrations": [], "method": method}


def _object(message: msgspec.Struct, kind: str) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.structs.asdict(message)
    return fields | {"object": kind}


def _page(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, "has_more": has_more, **ends}
