"""What of a prompt each executor has computed already: what its last beat told of, and what went there since. Pure bookkeeping:
no clock, no bus; digests of tokens, not what they mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from common.messages import Beat, ExecutorLoad, InferenceRequest
from common.prefix import KEY_BYTES, MAX_TOLD_PAGES, PageDigests, page_key


@dataclasses.dataclass
class _Pages:
    told: AbstractSet[bytes] = frozenset()
    sent: set[bytes] = dataclasses.field(default_factory=set)
    sent_before: set[bytes] = dataclasses.field(default_factory=set)
    """Before the last beat, which may be from before the executor had computed them."""

    def __contains__(self, key: bytes) -> bool:
        return key in self.told or key in self.sent or key in self.sent_before


class Prefixes:
    """Keys of pages by executor, at most MAX_TOLD_PAGES of each of three kinds. An executor that does not tell keeps none."""

    def __init__(self) -> None:
        self._pages: dict[str, _Pages] = {}

    def observe_beat(self, beat: Beat) -> None:
        """The executor tells what it has. What was sent until now is forgotten with the next beat, which tells of it."""
        if beat.executor is None or beat.executor.cached_pages is None:
            self._pages.pop(beat.instance_id, None)
            return
        keys = beat.executor.cached_pages[: KEY_BYTES * MAX_TOLD_PAGES]
        told = frozenset(keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))
        known = self._pages.get(beat.instance_id, _Pages())
        self._pages[beat.instance_id] = _Pages(told, set(), known.sent)

    def keep_only(self, executor_ids: AbstractSet[str]) -> None:
        """All other executors are dead."""
        for executor_id in self._pages.keys() - executor_ids:
            del self._pages[executor_id]

    def accepted(self, beat: Beat, request: InferenceRequest) -> None:
        """The executor took the request: its prompt's pages are there before another one's turn comes."""
        known = self._pages.get(beat.instance_id)
        if known is None or beat.executor is None:
            return
        for key in page_keys(request, beat.executor):
            if len(known.sent) >= MAX_TOLD_PAGES:
                return
            known.sent.add(key)

    def cached_tokens(self, request: InferenceRequest, beat: Beat) -> int:
        """Tokens that the prompt begins with and that the executor need not compute; the last one it always does.

        So it does with all of a prompt whose log probabilities are asked for.
        """
        known, load = self._pages.get(beat.instance_id), beat.executor
        if known is None or load is None or request.prompt_logprobs is not None:
            return 0
        num_cached = 0
        for key in page_keys(request, load):
            if key not in known or num_cached + load.page_size >= len(request.prompt_tokens):
                break
            num_cached += load.page_size
        return num_cached


def page_keys(request: InferenceRequest, load: ExecutorLoad) -> Iterator[bytes]:
    """Keys of the prompt's full pages on this executor; none if it does not have the request's adapter."""
    versions = dict(zip(load.adapters, load.adapter_versions, strict=False))
    version = 0 if request.model == load.model else versions.get(request.model)
    if version is None:
        return
    digests = PageDigests(load.page_size, version, request.cache_salt)
    for page in range(len(request.prompt_tokens) // load.page_size):
        try:
            yield page_key(digests.at(page, request.prompt_tokens))
        except OverflowError:  # a number that is no token of any model: the executor refuses it by name
            return
