"""The system's adapters: stored and announced, found, withdrawn. Knows the bus's buckets, not where weights come from."""

from __future__ import annotations

import contextlib
import difflib
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import structlog
from nats.errors import Error as NatsError
from nats.js.errors import KeyNotFoundError, NotFoundError

from common import subjects
from common.bus import Bus, NoServiceError, RemoteError
from common.codec import MalformedMessageError, decode, encode
from common.messages import AdapterChecked, AdapterRecord, CheckAdapter, FineTuningJob, JobQuery, LoraSpec, Rejected
from common.records import record_keys

log = structlog.get_logger()

CHECK_TIMEOUT_S = 60.0
MAX_NAME_CHARS = 256
MAX_NAMED = 10
"""Adapters that an error names."""
ANSWER: Any = AdapterChecked | Rejected


class AdapterRefusedError(ValueError):
    """The adapter's name or content is not acceptable; the message says why."""


class AdapterExistsError(AdapterRefusedError):
    """There is one of that name."""


class UnknownAdapterError(LookupError):
    """There is none of that name."""


async def adapter_records(bus: Bus) -> dict[str, AdapterRecord]:
    """All adapters by name. Records that do not decode are left out."""
    bucket = await bus.key_value(subjects.ADAPTERS_BUCKET)
    records = {}
    for key in await record_keys(bus, subjects.ADAPTERS_BUCKET):
        with contextlib.suppress(KeyNotFoundError, MalformedMessageError):
            record = decode((await bucket.get(key)).value or b"", AdapterRecord)
            records[record.name] = record
    return records


def unknown_adapter(name: str, names: Sequence[str]) -> str:
    """That there is none of that name, with the closest of those that there are, or the first few."""
    if close := difflib.get_close_matches(name, names):
        return f"no adapter {name}; did you mean {' or '.join(close)}?"
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"no adapter {name}; there are: {', '.join(names[:MAX_NAMED]) or 'none'}{more}"


async def add_adapter(bus: Bus, name: str, base_model: str, lora: LoraSpec, weights: bytes) -> AdapterRecord:
    """Store the weights, have an executor of the base model look at them, and announce the adapter to all.

    Raises AdapterRefusedError, and keeps nothing, when it does not fit; AdapterExistsError for a name that is taken.
    """
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable() or name == base_model:
        raise AdapterRefusedError(
            f"an adapter's name has 1 to {MAX_NAME_CHARS} printable characters, and is not the base model's"
        )
    bucket = await bus.key_value(subjects.ADAPTERS_BUCKET)
    if name in await adapter_records(bus):
        raise AdapterExistsError(f"there is an adapter {name} already")
    store = await bus.object_store(subjects.ARTIFACTS_STORE)
    record = AdapterRecord(
        name=name, base_model=base_model, artifact=f"imported/{uuid4().hex}", lora=lora, created_at=time.time()
    )
    await store.put(record.artifact, weights)
    try:
        await _check(bus, record)
        with contextlib.suppress(NatsError):  # of two with one name the first wins
            await bucket.create(subjects.adapter_key(name), encode(record))
            return record
        raise AdapterExistsError(f"there is an adapter {name} already")
    except BaseException:
        await store.delete(record.artifact)
        raise


async def remove_adapter(bus: Bus, name: str) -> AdapterRecord:
    """Withdraw the adapter from all executors and delete its weights, unless another adapter has the same.

    Raises UnknownAdapterError; AdapterRefusedError for a checkpoint of a job that has not ended, which may resume from it.
    """
    bucket = await bus.key_value(subjects.ADAPTERS_BUCKET)
    records = await adapter_records(bus)
    record = records.pop(name, None)
    if record is None:
        raise UnknownAdapterError(unknown_adapter(name, sorted(records)))
    if record.job_id:
        await _check_job_is_over(bus, record)
    for key in await record_keys(bus, subjects.ADAPTERS_BUCKET):
        with contextlib.suppress(KeyNotFoundError, MalformedMessageError):
            if decode((await bucket.get(key)).value or b"", AdapterRecord).name == name:
                await bucket.delete(key)
    if all(other.artifact != record.artifact for other in records.values()):
        store = await bus.object_store(subjects.ARTIFACTS_STORE)
        for object_name in (record.artifact, f"{record.artifact}.optimizer"):
            with contextlib.suppress(NotFoundError):
                await store.delete(object_name)
    return record


async def _check_job_is_over(bus: Bus, record: AdapterRecord) -> None:
    try:
        job = await bus.request(subjects.finetune("get"), JobQuery(job_id=record.job_id), FineTuningJob)
    except RemoteError as error:
        if error.reply.status == 404:
            return
        raise
    except NoServiceError as error:
        raise NoServiceError(f"no trainer can tell whether the job {record.job_id} still needs {record.name}") from error
    if job.status not in ("succeeded", "failed", "cancelled"):
        raise AdapterRefusedError(f"the job {record.job_id} is {job.status} and may resume from {record.name}; cancel it first")


async def _check(bus: Bus, record: AdapterRecord) -> None:
    try:
        subject = subjects.check_adapter(record.base_model)
        answer: AdapterChecked | Rejected = await bus.request(subject, CheckAdapter(record=record), ANSWER, CHECK_TIMEOUT_S)
    except NoServiceError as error:
        raise AdapterRefusedError(f"no executor that serves the base model {record.base_model} is ready") from error
    if isinstance(answer, Rejected):
        raise AdapterRefusedError(answer.message)
