"""What this admission sent to executors that their last heartbeat cannot know yet. Pure bookkeeping: no clock, no bus."""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Set as AbstractSet

import msgspec

from common.messages import Beat, InferenceRequest

NUM_DELAYS = 16
"""Beats by which the difference of two clocks is known; older ones may be from before a clock was set."""


@dataclasses.dataclass
class _Entry:
    num_tokens: int
    num_cached: int
    tpot_ms: float | None
    accepted_at: float | None = None


class InFlight:
    """Requests by executor, from the moment they are sent until a heartbeat counts them.

    An executor counts a request before it says that it accepts it, so a beat that it sends after that counts it too. A beat
    sent before may arrive after the acceptance. So an entry leaves with the first beat sent after the acceptance arrived here.
    When that is by our clock, beats' arrivals tell: the one that came fastest bounds how far the executor's clock is off.
    """

    def __init__(self) -> None:
        self._entries: defaultdict[str, dict[str, _Entry]] = defaultdict(dict)
        self._delays: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_DELAYS))

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._entries.values())

    def send(self, executor_id: str, request: InferenceRequest, cached_tokens: int = 0) -> None:
        """The request is on its way to this executor, which has so many tokens of its prompt."""
        entry = _Entry(len(request.prompt_tokens), cached_tokens, request.slo.tpot_ms)
        self._entries[executor_id][request.request_id] = entry

    def settle(self, executor_id: str, request_id: str, *, accepted: bool, now: float) -> None:
        """The executor answered, or never will. `now` may be of any clock, but always of the same."""
        entries = self._entries[executor_id]
        if not accepted:
            entries.pop(request_id, None)
        elif request_id in entries:
            entries[request_id].accepted_at = now

    def observe_beat(self, executor_id: str, sent_at: float, now: float) -> None:
        """The executor's load, heard now, counts all that it had accepted when it sent it, by its own clock."""
        delays = self._delays[executor_id]
        delays.append(now - sent_at)
        sent = sent_at + min(delays)
        entries = self._entries.pop(executor_id, {})
        waiting = {name: entry for name, entry in entries.items() if entry.accepted_at is None or entry.accepted_at >= sent}
        if waiting:
            self._entries[executor_id] = waiting

    def keep_only(self, executor_ids: AbstractSet[str]) -> None:
        """All other executors are dead."""
        for known in (self._entries, self._delays):
            for executor_id in known.keys() - executor_ids:
                del known[executor_id]

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
            waiting_prefill_tokens=load.waiting_prefill_tokens
            + sum(entry.num_tokens - entry.num_cached for entry in entries.values()),
            promised_tpot_ms=load.promised_tpot_ms + promised,
            free_pages=max(0, load.free_pages - pages),
        )
        return msgspec.structs.replace(beat, executor=load)
