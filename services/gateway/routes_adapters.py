"""vLLM's /v1/load_lora_adapter and /v1/unload_lora_adapter, OpenAI's DELETE of models. Knows folders and names, not tensors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter, Request
from nats.errors import Error as NatsError
from starlette.responses import PlainTextResponse, Response

from common.adapters import (
    AdapterRefusedError,
    UnknownAdapterError,
    adapter_records,
    add_adapter,
    remove_adapter,
)
from common.bus import Bus, BusError, NoServiceError
from common.peft_folder import CONFIG, PeftFolder, PeftFolderError, is_same_model, read_peft_folder
from services.gateway.docs import body_of
from services.gateway.errors import ApiError, bad_request, model_not_found, unavailable
from services.gateway.http_errors import json_response
from services.gateway.models import Catalog
from services.gateway.openai_api import LoadLoraAdapter, UnloadLoraAdapter, decode_json

SEEN_WAIT_S = 5.0


def adapter_routes(bus: Bus, catalog: Catalog, lora_dir: str | None, max_bytes: int, base_folder: str) -> APIRouter:
    """The routes. Paths are read below `lora_dir` only; adapters may also call the base model by its folder's name."""
    router = APIRouter(tags=["Models"])

    @router.post("/v1/load_lora_adapter", summary="Serve a PEFT folder", openapi_extra=body_of(LoadLoraAdapter))
    async def load(request: Request) -> Response:
        """From now on `lora_name` is a model, on all executors; its files are copied. 400 for what does not fit."""
        body = decode_json(await request.body(), LoadLoraAdapter)
        if not body.lora_name or not body.lora_path:
            raise bad_request("Both 'lora_name' and 'lora_path' must be provided.", "lora_name")
        if body.lora_name == catalog.base or body.lora_name in await adapter_records(bus):
            raise bad_request(f"The lora adapter '{body.lora_name}' has already been loaded.", "lora_name")
        folder = _allowed(body.lora_path, lora_dir)
        found = await asyncio.to_thread(_read, folder, body.lora_path, max_bytes)
        if body.base_model_name not in (None, catalog.base):
            raise bad_request(f"The base model here is {catalog.base!r}.", "base_model_name")
        if body.base_model_name is None and found.base_model and not is_same_model(found.base_model, catalog.base, base_folder):
            message = f"{CONFIG}: base_model_name_or_path is {found.base_model!r}, the base model here is {catalog.base!r}."
            raise bad_request(message + " If they are the same, say so with base_model_name.", "lora_path")
        try:
            await add_adapter(bus, body.lora_name, catalog.base, found.lora, found.weights)
        except AdapterRefusedError as error:
            raise bad_request(f"{error}.", "lora_path") from error
        except (BusError, NatsError) as error:
            raise unavailable("The adapter could not be stored.", "bus_unavailable") from error
        await _told(lambda: catalog.has(body.lora_name), catalog)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", summary="Serve an adapter no more", openapi_extra=body_of(UnloadLoraAdapter))
    async def unload(request: Request) -> Response:
        """Only of those that were loaded or imported; what a finetuning job made is deleted with `heddle adapters delete`."""
        name = decode_json(await request.body(), UnloadLoraAdapter).lora_name
        if not name:
            raise bad_request("'lora_name' needs to be provided to unload a LoRA adapter.", "lora_name")
        record = (await adapter_records(bus)).get(name)
        if record is not None and record.job_id:
            message = f"{name!r} was made by the job {record.job_id}, not loaded: its weights exist nowhere else."
            raise bad_request(message, "lora_name")
        try:
            await remove_adapter(bus, name)
        except UnknownAdapterError as error:
            raise ApiError(404, f"The lora adapter '{name}' cannot be found.", code="not_found", param="lora_name") from error
        await _told(lambda: not catalog.has(name), catalog)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return router


def deletion_route(bus: Bus, catalog: Catalog) -> APIRouter:
    """OpenAI's deletion of a model that a job made; of other adapters, too."""
    router = APIRouter(tags=["Models"])

    @router.delete("/v1/models/{model:path}", summary="Delete an adapter")
    async def delete(model: str) -> Response:
        """Served no more, on all executors, and its weights deleted. 403 for the base model, 409 while its job may need it."""
        if model == catalog.base:
            raise ApiError(403, f"{model!r} is the base model; only adapters can be deleted.", param="model")
        if not catalog.has(model):
            raise model_not_found(model)
        try:
            await remove_adapter(bus, model)
        except UnknownAdapterError as error:
            raise model_not_found(model) from error
        except AdapterRefusedError as error:
            raise ApiError(409, f"{error}.", code="model_in_use", param="model") from error
        except NoServiceError as error:
            raise unavailable(f"{error}.", "no_trainer") from error
        except (BusError, NatsError) as error:
            raise unavailable("The adapter could not be deleted.", "bus_unavailable") from error
        await _told(lambda: not catalog.has(model), catalog)
        return json_response({"id": model, "object": "model", "deleted": True})

    return router


def _allowed(lora_path: str, lora_dir: str | None) -> Path:
    """The real folder, links followed. Raises ApiError 403 for one that is not below `lora_dir`."""
    if not lora_dir:
        raise ApiError(403, "No folder is set to load adapters from (HEDDLE_GATEWAY_LORA_DIR).", param="lora_path")
    top = Path(lora_dir).resolve()
    folder = (top / lora_path).resolve()
    if not folder.is_relative_to(top):
        raise ApiError(403, "lora_path is not below the folder that adapters may be loaded from.", param="lora_path")
    return folder


def _read(folder: Path, lora_path: str, max_bytes: int) -> PeftFolder:
    try:
        return read_peft_folder(folder, max_bytes)
    except FileNotFoundError as error:
        raise ApiError(404, f"No adapter found at {lora_path!r}.", code="not_found", param="lora_path") from error
    except (PeftFolderError, OSError, ValueError) as error:
        raise bad_request(f"{error}.", "lora_path") from error


async def _told(holds: Callable[[], bool], catalog: Catalog) -> None:
    """Wait until this gateway, too, has heard of the change; others hear of it in the same moment."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SEEN_WAIT_S), catalog.changed:
            await catalog.changed.wait_for(holds)
