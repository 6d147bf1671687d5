"""A request on its way: its SLO, sampling and constraint, its admission, and the chunks that answer it."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]
RejectReason = Literal[
    "overloaded", "no_executor", "unknown_model", "too_long", "invalid", "duplicate", "stale_lease", "not_found", "draining"
]
MAX_SALT_CHARS = 256


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """Latency targets of one request; None means best effort."""

    tpot_ms: float | None = None
    ttft_ms: float | None = None


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn. `temperature` 0 is greedy; random numbers are a function of (seed, position).

    Order: min_tokens, logit_bias, penalties, temperature, min_p, top_k, top_p. `logit_bias` are pairs of token and bias.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    """So many output tokens come before any that ends the request."""
    seed: int = 0


MAX_LOGIT_BIAS = 1024
"""Tokens that one request may bias."""
MAX_TOP_LOGPROBS = 20
"""Alternatives per token whose log probabilities a request may ask for."""
MAX_CONSTRAINT_CHARS = 65536
"""Longest text of a constraint."""


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What the whole output must be: JSON after a schema, any JSON object (`text` is empty), a full match of a regex, one of a
    JSON list of strings, or a word of a grammar (Lark or GBNF).
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    text: str = ""


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True, tag="infer.1"):
    """A tokenized request. The last `num_generated` prompt tokens are output of an earlier executor that died.

    `max_tokens` counts all output, those tokens included.
    """

    request_id: str
    model: str
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    slo: Slo = Slo()
    constraint: Constraint | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    num_generated: int = 0
    logprobs: int | None = None
    """Log probabilities of each output token and of so many of the most probable ones; None: of none."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, its first and the `num_generated` last ones excepted: all its rows are computed."""
    priority: int = 0
    """Lower is prefilled earlier."""
    arrived_at: float = 0.0
    cache_salt: str = ""
    """Only requests with the same salt share cached keys and values."""
    gateway_id: str = ""
    """The gateway that takes the tokens: when it dies, the request ends. Empty: whoever asked, it runs to its end."""
    base_model: str = ""
    """The base model of an adapter: executors that serve it load the adapter if need be. Empty: `model` is what they list."""


class Admit(msgspec.Struct, frozen=True, kw_only=True, tag="admit.1"):
    """Admission's order to one executor: run this request; its first token is due at `first_token_due_at` (0: no target)."""

    request: InferenceRequest
    first_token_due_at: float = 0.0


class Admitted(msgspec.Struct, frozen=True, kw_only=True, tag="admitted.1"):
    """The request runs on this executor; its tokens arrive on `stream.<request_id>`."""

    request_id: str
    executor_id: str
    best_effort: bool = False
    attainable: bool = True
    """Whether admission expects the request's own targets to be met."""


class Rejected(msgspec.Struct, frozen=True, kw_only=True, tag="rejected.1"):
    """A typed refusal. `reason` is the wire code; `retry_after_ms` 0 means that retrying cannot help."""

    reason: RejectReason
    message: str
    retry_after_ms: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one request on one executor; `verify_steps` is the number of its decode iterations."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    verify_steps: int = 0
    decode_ms: float = 0.0


class Logprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities of consecutive tokens under the unprocessed distribution; a probability of zero is -9999.

    `chosen[i]` is token i's own; its `num_top` most probable alternatives, best first, are at i * num_top of the other two.
    """

    chosen: tuple[float, ...]
    num_top: int = 0
    top_tokens: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class TokenChunk(msgspec.Struct, frozen=True, kw_only=True, tag="chunk.1"):
    """Tokens committed in one iteration. `seq` counts from 0 without gaps; the last chunk has a finish reason.

    `usage` counts up to this chunk: a requester may stop listening at any. `logprobs` are of its tokens. `prompt_logprobs` come
    before the first token, in chunks of their own, in the prompt's order.
    """

    request_id: str
    seq: int
    tokens: tuple[int, ...] = ()
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None
    executor_id: str = ""


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel.1"):
    """Stop this request and free its pages; an unknown request is not an error."""

    request_id: str
