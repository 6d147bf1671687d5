"""What this admission sent to executors that their last heartbeat cannot know yet. Pure bookkeeping: no clock, no bus."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Set as AbstractSet

import msgspec

from common.messages import Beat, InferenceRequest


@dataclasses.dataclass
class _Entry:
    num_tokens: int
    tpot_ms: float | None
    is_settled: bool = False


class InFlight:
    """Requests by executor, from the moment they are sent until a heartbeat counts them.

    A beat that arrives after the executor's acceptance counts the request already; one that arrives before may not. So an entry
    stays at least until it is settled, and leaves with the first beat after that.
    """

    def __init__(self) -> None:
        self._entries: defaultdict[str, dict[str, _Entry]] = defaultdict(dict)

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._entries.values())

    def send(self, executor_id: str, request: InferenceRequest) -> None:
        """The request is on its way to this executor."""
        self._entries[executor_id][request.request_id] = _Entry(len(request.prompt_tokens), request.slo.tpot_ms)

    def settle(self, executor_id: str, request_id: str, *, accepted: bool) -> None:
        """The executor answered, or never will."""
        entries = self._entries[executor_id]
        if not accepted:
            entries.pop(request_id, None)
        elif request_id in entries:
            entries[request_id].is_settled = True

    def observe_beat(self, executor_id: str) -> None:
        """The executor's load now counts all that it had accepted."""
        entries = self._entries.pop(executor_id, {})
        if waiting := {request_id: entry for request_id, entry in entries.items() if not entry.is_settled}:
            self._entries[executor_id] = waiting

    def keep_only(self, executor_ids: AbstractSet[str]) -> None:
        """All other executors are dead."""
        for executor_id in self._entries.keys() - executor_ids:
            del self._entries[executor_id]

    def add_to(self, beat: Beat) -> Beat:
        """The executor's beat with its load as it should be by now."""
        load, entries = beat.executor, self._entries.get(beat.instance_id)
        if load is None or not entries:
            return beat
        pages = sum(-(-entry.num_tokens // load.page_size) for entry in entries.values())
        promised = tuple(entry.tpot_ms for entry in entries.values() if entry.tpot_ms is not None)
        load = msgspec.structs.replace(
            load,
            num_waiting=load.num_waiting + len(entries),
            waiting_prefill_tokens=load.waiting_prefill_tokens + sum(entry.num_tokens for entry in entries.values()),
            promised_tpot_ms=load.promised_tpot_ms + promised,
            free_pages=max(0, load.free_pages - pages),
        )
        return msgspec.structs.replace(beat, executor=load)
