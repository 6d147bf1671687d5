"""Which latency target a request has, and whether it was met. Pure: headers and milliseconds in, verdict out."""

from __future__ import annotations

import math
from collections.abc import Mapping

from common.messages import Slo
from services.gateway.errors import bad_request
from services.gateway.openai_api import SloFields

TPOT_HEADERS = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
TTFT_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")


def resolve_slo(body: SloFields | None, headers: Mapping[str, str], default: Slo) -> Slo:
    """The request's targets, each by itself: body before header before default. Header names are lower case.

    Raises ApiError 400 for a header that is not a positive number.
    """
    body = body or SloFields()
    return Slo(
        tpot_ms=body.tpot_ms or _from_headers(headers, TPOT_HEADERS) or default.tpot_ms,
        ttft_ms=body.ttft_ms or _from_headers(headers, TTFT_HEADERS) or default.ttft_ms,
    )


def attained(slo: Slo, ttft_ms: float | None, tpot_ms: float | None) -> bool | None:
    """Whether every target was met; None when there is none. A target that could not be measured counts as met."""
    pairs = [(slo.ttft_ms, ttft_ms), (slo.tpot_ms, tpot_ms)]
    verdicts = [measured is None or measured <= target for target, measured in pairs if target is not None]
    return all(verdicts) if verdicts else None


def _from_headers(headers: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    for name in names:
        text = headers.get(name)
        if text is not None:
            return _positive(text, name)
    return None


def _positive(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e9:
        raise bad_request(f"The header {name} must be a positive number of milliseconds, not {text!r}.", param=name)
    return value
