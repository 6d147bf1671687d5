"""How an uploaded or made file lies in the bus's object store. Knows its metadata, not what is in it."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
from nats.js.api import ObjectInfo, ObjectMeta


def file_meta(file_id: str, filename: str, purpose: str, now: float) -> ObjectMeta:
    """An object's name is the file's id; its description holds OpenAI's FileObject as JSON, so that files survive restarts."""
    record = {"id": file_id, "object": "file", "created_at": int(now), "filename": filename, "purpose": purpose}
    return ObjectMeta(name=file_id, description=msgspec.json.encode(record).decode())


def file_object(info: ObjectInfo) -> dict[str, Any]:
    """The stored record and its size; an object without a record counts as a result."""
    record: dict[str, Any] = {"id": info.name, "object": "file", "created_at": 0, "filename": info.name}
    record["purpose"] = "fine-tune-results"
    with contextlib.suppress(msgspec.DecodeError):
        record |= msgspec.json.decode(info.description or "{}", type=dict[str, Any])
    return record | {"bytes": info.size or 0, "status": "processed"}
