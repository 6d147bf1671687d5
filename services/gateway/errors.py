"""Errors as OpenAI's clients read them: status, body and headers. Knows what went wrong, not where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.messages import ErrorReply, Rejected, RejectReason

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    409: "conflict_error",
    429: "rate_limit_error",
    499: "cancelled",
    503: "service_unavailable",
    504: "timeout_error",
}

_REJECTIONS: Mapping[RejectReason, tuple[int, str]] = {
    "overloaded": (429, "overloaded"),
    "no_executor": (503, "no_executor"),
    "draining": (503, "draining"),
    "unknown_model": (404, "model_not_found"),
    "too_long": (400, "context_length_exceeded"),
    "invalid": (400, "invalid_request"),
}


class ApiError(Exception):
    """A refusal that the client is told: status and body are OpenAI's."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after_ms: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_ms = retry_after_ms

    @property
    def body(self) -> dict[str, Any]:
        """The error object; all four keys are always there."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to retry, in ms for clients that read them and in whole seconds for the others."""
        if not self.retry_after_ms:
            return {}
        return {"retry-after-ms": str(self.retry_after_ms), "retry-after": str(-(-self.retry_after_ms // 1000))}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request itself is wrong; `param` names the field."""
    return ApiError(400, message, param=param, code=code)


def model_not_found(model: str) -> ApiError:
    """No such model or adapter."""
    return ApiError(404, f"The model {model!r} does not exist.", code="model_not_found", param="model")


def unavailable(message: str, code: str, retry_after_ms: int = 1000) -> ApiError:
    """The system cannot serve this now; a retry may succeed."""
    return ApiError(503, message, code=code, retry_after_ms=retry_after_ms)


def from_rejection(rejected: Rejected) -> ApiError:
    """Admission's refusal; reasons that a client cannot cause are 500."""
    status, code = _REJECTIONS.get(rejected.reason, (500, "internal"))
    return ApiError(status, rejected.message, code=code, retry_after_ms=rejected.retry_after_ms)


def from_reply(reply: ErrorReply) -> ApiError:
    """A service's typed error."""
    return ApiError(reply.status, reply.message, code=reply.code, param=reply.param)
