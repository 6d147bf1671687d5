"""An error on its way to a user, with the status and names of OpenAI's API."""

from __future__ import annotations

import msgspec


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True, tag="error.1"):
    """A typed error: `status` is the HTTP status that it maps to, `code` and `param` are OpenAI's."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
