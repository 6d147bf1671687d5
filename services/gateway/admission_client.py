"""Asking admission for an executor, and cancelling. Knows the bus, not tokens or streams."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from common import subjects
from common.bus import Bus, BusTimeoutError, NoServiceError, RemoteError, TooLargeError
from common.codec import MalformedMessageError
from common.messages import Admitted, Cancel, InferenceRequest, Rejected
from services.gateway.errors import ApiError, bad_request, from_rejection, from_reply, unavailable


class AdmissionClient:
    """`counters` holds refusals by reason, for heartbeats."""

    def __init__(self, bus: Bus, timeout_s: float) -> None:
        self.bus = bus
        self.counters: Counter[str] = Counter()
        self._timeout_s = timeout_s

    async def ask(self, request: InferenceRequest) -> Admitted:
        """The executor that runs the request from now on. Raises ApiError when none does.

        If the caller is cancelled meanwhile, the request is cancelled too: after it was admitted, because an executor
        forgets a cancel that comes before its request.
        """
        asking = asyncio.ensure_future(self._ask(request))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self.bus.spawn(self._cancel_once_admitted(asking, request.request_id))
            raise

    def cancel(self, request_id: str) -> None:
        """Stop a request, wherever it runs."""
        self.bus.spawn(self.bus.publish(subjects.cancel(request_id), Cancel(request_id=request_id)))

    async def _ask(self, request: InferenceRequest) -> Admitted:
        expected: Any = Admitted | Rejected
        try:
            reply: Admitted | Rejected = await self.bus.request(subjects.INFER, request, expected, self._timeout_s)
        except NoServiceError as error:
            raise unavailable("No admission service is running.", "no_admission") from error
        except BusTimeoutError as error:
            self.cancel(request.request_id)
            raise unavailable("The admission service did not answer in time.", "admission_timeout") from error
        except TooLargeError as error:
            raise bad_request("The prompt is too large to be sent.", code="context_length_exceeded") from error
        except RemoteError as error:
            raise from_reply(error.reply) from error
        except MalformedMessageError as error:
            raise ApiError(500, "The admission service gave an unreadable answer.", code="internal") from error
        if isinstance(reply, Rejected):
            self.counters[f"rejected_{reply.reason}"] += 1
            raise from_rejection(reply)
        return reply

    async def _cancel_once_admitted(self, asking: asyncio.Future[Admitted], request_id: str) -> None:
        await asyncio.wait([asking])
        if not asking.cancelled() and asking.exception() is None:
            self.cancel(request_id)
