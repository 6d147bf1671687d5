"""How an uploaded or made file lies in the bus's object store. Knows its metadata, not what is in it."""

from __future__ import annotations

import msgspec
from nats.js.api import ObjectMeta


def file_meta(file_id: str, filename: str, purpose: str, now: float) -> ObjectMeta:
    """An object's name is the file's id; its description holds OpenAI's FileObject as JSON, so that files survive restarts."""
    record = {"id": file_id, "object": "file", "created_at": int(now), "filename": filename, "purpose": purpose}
    return ObjectMeta(name=file_id, description=msgspec.json.encode(record).decode())
