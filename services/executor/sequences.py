"""The token state of the requests inside an executor. Knows tokens, pages and times, not tensors or the bus."""

from __future__ import annotations

import dataclasses

from common.messages import DraftTree, FinishReason, InferenceRequest, OpenedSequence, Usage
from common.prefix import PageDigests
from services.executor.features import FeatureWindow
from services.executor.grammar import GrammarState
from services.executor.logits import LogitsProcessor, processor_of
from services.executor.lora import LoraAdapter
from services.executor.model_config import ModelConfig
from services.executor.pages import PageAllocator, PageTable
from services.executor.views import SequenceView


@dataclasses.dataclass(eq=False)
class Sequence:
    """One running request. The KV of tokens[:num_computed] is valid; the rest is to be computed, the last token included.

    A preempted sequence has num_computed 0 and an empty table, and is computed again with all tokens it has.
    """

    request: InferenceRequest
    tokens: list[int]
    table: PageTable
    adapter: LoraAdapter | None
    stop_ids: frozenset[int]
    first_token_due_at: float | None
    num_output: int
    processor: LogitsProcessor | None = None
    grammar: GrammarState | None = None
    """Advanced as tokens are drawn: never behind `tokens`, and beyond them only when the request ends."""
    digests: PageDigests | None = None
    """Names of its full pages; None: it neither uses nor fills the prefix cache."""
    features: FeatureWindow | None = None
    """Hidden states of its last tokens, if a planner wants them."""
    num_computed: int = 0
    num_cached: int = 0
    """Prompt tokens that another sequence had computed."""
    num_preemptions: int = 0
    num_scored: int = 1
    """Prompt tokens whose log probabilities were told; the first one has none."""
    next_seq: int = 0
    first_token_at: float | None = None
    num_first: int = 0
    tree: DraftTree | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    verify_steps: int = 0

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        """Prompt tokens that are no output of an earlier executor."""
        return len(self.request.prompt_tokens) - self.request.num_generated

    @property
    def output(self) -> list[int]:
        """The output so far, an earlier executor's included."""
        return self.tokens[self.num_prompt :]

    @property
    def num_uncomputed(self) -> int:
        """Tokens without valid KV; at least one, as the last token's logits are always still needed."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token, a generated one, is left to compute."""
        return self.num_uncomputed == 1 and self.first_token_at is not None

    @property
    def has_started(self) -> bool:
        """Whether some of its pages were computed by itself, not all taken over."""
        return len(self.table.pages) > self.table.num_taken

    @property
    def num_unneeded(self) -> int:
        """Tokens whose rows are of no use if their keys and values are cached: all but the last, and prompts to be scored."""
        return (self.num_scored if self.num_unscored else len(self.tokens)) - 1

    @property
    def num_unscored(self) -> int:
        """Prompt tokens whose log probabilities are wanted and not told yet."""
        return 0 if self.request.prompt_logprobs is None else max(0, self.num_prompt - self.num_scored)

    @property
    def remaining_output(self) -> int:
        """Output tokens that may still come."""
        return self.request.max_tokens - self.num_output

    def decode_ms(self, now: float) -> float:
        """Time since the first token (AdaServe's l)."""
        return 0.0 if self.first_token_at is None else max(0.0, (now - self.first_token_at) * 1e3)

    def view(self, now: float) -> SequenceView:
        """What the scheduler sees."""
        tree = self.tree if self.is_decoding else None
        return SequenceView(
            request_id=self.request_id,
            num_uncomputed=self.num_uncomputed,
            is_decoding=self.is_decoding,
            context_tokens=self.num_computed,
            arrived_at=self.request.arrived_at,
            priority=self.request.priority,
            num_decoded=self.num_output - self.num_first,
            max_remaining=max(1, self.remaining_output),
            decode_ms=self.decode_ms(now),
            tpot_ms=self.request.slo.tpot_ms,
            first_token_due_at=self.first_token_due_at,
            tokens_per_step=(self.num_output - self.num_first) / self.verify_steps if self.verify_steps else 1.0,
            tree_probs=() if tree is None else tree.probs[1:],
            num_unscored=self.num_unscored,
            num_required=0 if tree is None else tree.num_required,
        )

    def take_over(self, pages: PageAllocator) -> None:
        """Hold the cached pages that its tokens go on with."""
        size, digests = pages.page_size, self.digests
        while self.num_computed == len(self.table.pages) * size and self.num_computed + size <= self.num_unneeded:
            page = len(self.table.pages)
            if digests is None or not pages.take(self.table, digests.at(page, self.tokens)):
                return
            self.num_computed += size
            self.num_cached += 0 if self.num_preemptions else size

    def publish(self, pages: PageAllocator) -> None:
        """Let others take over the pages that have become full of tokens with valid KV; nothing is written there any more."""
        num_full = min(self.num_computed, len(self.tokens)) // pages.page_size
        if self.digests is not None:
            for page in range(self.table.num_published, num_full):
                pages.publish(self.table, self.digests.at(page, self.tokens))

    def give_back(self, pages: PageAllocator) -> None:
        """Hold no page and compute everything again, or what is not cached by then."""
        if self.has_started:
            self.num_preemptions += 1
        elif not self.num_preemptions:
            self.num_cached = 0
        pages.release(self.table)
        self.num_computed = 0
        self.tree = None

    def commit(self, tokens: tuple[int, ...], now: float) -> FinishReason | None:
        """Append drawn tokens up to the first that ends the request; returns why it ended, if it did."""
        if self.first_token_at is None:
            self.first_token_at, self.num_first = now, self.num_output + 1
        for token in tokens:
            self.tokens.append(token)
            self.num_output += 1
            if token in self.stop_ids or self._is_complete:
                return "stop"
            if self.remaining_output <= 0:
                return "length"
        return None

    @property
    def _is_complete(self) -> bool:
        """Whether the constraint lets nothing follow; `ignore_eos` goes on, unconstrained."""
        complete_at = None if self.grammar is None or self.request.ignore_eos else self.grammar.complete_at
        return complete_at is not None and self.num_output >= complete_at

    def opened(self) -> OpenedSequence:
        """How a planner gets to know this sequence."""
        return OpenedSequence(
            request_id=self.request_id,
            tokens=tuple(self.tokens),
            num_output=self.num_output,
            num_decoded=self.num_output - self.num_first,
            max_output=self.request.max_tokens,
            tpot_ms=self.request.slo.tpot_ms,
            tenant=f"{self.request.model}\n{self.request.cache_salt}",
            features=b"" if self.features is None else self.features.before(len(self.tokens) - 1),
        )

    def usage(self, now: float) -> Usage:
        """Counts so far."""
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_output,
            cached_tokens=min(self.num_cached, self.num_prompt),
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            verify_steps=self.verify_steps,
            decode_ms=self.decode_ms(now),
        )


def new_sequence(
    request: InferenceRequest,
    config: ModelConfig,
    pages: PageAllocator,
    adapter: LoraAdapter | None,
    grammar: GrammarState | None,
    *,
    first_token_due_at: float | None,
    has_prefix_cache: bool,
) -> Sequence:
    """A request before its first pass, without pages; one that was not refused."""
    stop_ids = frozenset((*(() if request.ignore_eos else config.eos_token_ids), *request.stop_token_ids))
    prompt = request.prompt_tokens[: len(request.prompt_tokens) - request.num_generated]
    version = adapter.version if adapter else 0
    return Sequence(
        request=request,
        tokens=list(request.prompt_tokens),
        table=pages.table(),
        adapter=adapter,
        stop_ids=stop_ids,
        first_token_due_at=first_token_due_at,
        num_output=request.num_generated,
        processor=processor_of(request.sampling, prompt, stop_ids, config.vocab_size),
        digests=PageDigests(pages.page_size, version, request.cache_salt) if has_prefix_cache else None,
        grammar=grammar,
    )
