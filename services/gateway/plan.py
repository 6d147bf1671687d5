"""From a valid request and its prompt tokens to the executors' requests. Pure: clock, seed and ids are arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.messages import InferenceRequest, Sampling, Slo
from services.gateway.constraints import constraint_of
from services.gateway.errors import bad_request
from services.gateway.models import ServedModel
from services.gateway.openai_api import (
    MAX_PROMPTS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    check_supported,
)

MAX_LOGPROBS = 2**21
"""Log probabilities, alternatives included, that one request may ask for: an answer has some 60 bytes for each."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of /v1/completions."""
_MASK_63 = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_n: int
    max_tokens_limit: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where and when a request came in; `seed` is used if it names none."""

    request_id: str
    arrived_at: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One client request: `requests` are its choices in order, `num_samples` of them for each prompt."""

    kind: Literal["chat", "completion"]
    origin: Origin
    model: str
    requests: tuple[InferenceRequest, ...]
    num_samples: int
    stops: tuple[str, ...]
    hidden_tokens: frozenset[int]
    is_stream: bool
    has_usage_chunk: bool
    slo: Slo
    echoes: tuple[str, ...] = ()
    """Texts of the prompts, if answers begin with them."""
    prompt_logprobs: int | None = None
    """Alternatives per prompt token beside the choices, as in vLLM; None: not asked for."""
    hides_output: bool = False
    """Whether the only token that was asked of an executor is not shown: the client wants none."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(request.prompt_tokens) for request in self.requests[:: self.num_samples])


def check(request: GenerateRequest, limits: Limits) -> None:
    """Raises ApiError 400 for what is wrong whatever the model: unsupported parameters and values out of their range."""
    check_supported(request)
    logprobs_of(request)
    bias_of(request, limits.vocab_size)
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options are allowed only when stream is true.", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise bad_request("prompt_logprobs are not told in streams; completions have echo with logprobs.", "prompt_logprobs")
    if (request.n or 1) > limits.max_n:
        raise bad_request(f"n must be at most {limits.max_n}.", "n", "integer_above_max_value")
    name, value = max_tokens_of(request)
    if value == 0 and not (isinstance(request, CompletionRequest) and request.echo):
        raise bad_request(f"{name} must be at least 1 without echo.", name, "integer_below_min_value")
    stops = stops_of(request)
    if any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise bad_request(f"Each stop string must have 1 to {MAX_STOP_CHARS} characters, at most {MAX_STOPS} of them.", "stop")


def check_prompts(prompts: Sequence[Sequence[int]], limits: Limits) -> None:
    """Raises ApiError 400 for an empty prompt, a token outside the vocabulary or too many prompts."""
    if len(prompts) > MAX_PROMPTS:
        raise bad_request(f"At most {MAX_PROMPTS} prompts are allowed in one request.", "prompt")
    for prompt in prompts:
        if not prompt:
            raise bad_request("The prompt has no tokens.", "prompt")
        if not 0 <= min(prompt) <= max(prompt) < limits.vocab_size:
            raise bad_request(f"Token ids must be in 0..{limits.vocab_size - 1}.", "prompt")


def make_plan(
    request: GenerateRequest,
    prompts: Sequence[tuple[int, ...]],
    *,
    model: ServedModel,
    slo: Slo,
    limits: Limits,
    model_stops: tuple[int, ...],
    origin: Origin,
    echoes: tuple[str, ...] = (),
) -> Plan:
    """Raises ApiError 400 when a prompt and its output do not fit the model's context, too many numbers are asked for, or the
    constraint makes no sense.
    """
    num_samples = request.n or 1
    logprobs = logprobs_of(request)
    stop_token_ids = tuple(request.stop_token_ids or ())
    constraint = constraint_of(request)
    asked = [number for number in (logprobs if echoes else None, request.prompt_logprobs) if number is not None]
    seed = origin.seed if request.seed is None else request.seed & _MASK_63
    requests = [
        InferenceRequest(
            request_id=origin.request_id if sample == number == 0 else f"{origin.request_id}-{number}-{sample}",
            model=model.name,
            base_model=model.base_model,
            prompt_tokens=prompt,
            max_tokens=max(fit_max_tokens(request, len(prompt), model, limits), 1),
            sampling=sampling_of(request, derive_seed(seed, sample), limits.vocab_size),
            logprobs=logprobs,
            prompt_logprobs=max(asked, default=None),
            slo=slo,
            constraint=constraint,
            ignore_eos=bool(request.ignore_eos),
            stop_token_ids=stop_token_ids if request.ignore_eos else tuple(dict.fromkeys(stop_token_ids + model_stops)),
            priority=request.priority or 0,
            arrived_at=origin.arrived_at,
            cache_salt=request.cache_salt or "",
        )
        for number, prompt in enumerate(prompts)
        for sample in range(num_samples)
    ]
    _check_requests(requests)
    return Plan(
        kind="chat" if isinstance(request, ChatRequest) else "completion",
        origin=origin,
        model=model.name,
        requests=tuple(requests),
        num_samples=num_samples,
        stops=stops_of(request),
        hidden_tokens=frozenset(stop_token_ids),
        is_stream=bool(request.stream),
        has_usage_chunk=bool(request.stream_options and request.stream_options.include_usage),
        slo=slo,
        echoes=echoes,
        prompt_logprobs=request.prompt_logprobs,
        hides_output=max_tokens_of(request)[1] == 0,
    )


def _check_requests(requests: Sequence[InferenceRequest]) -> None:
    for made in requests:
        if made.sampling.min_tokens > made.max_tokens:
            raise bad_request(f"min_tokens must be at most max_tokens, {made.max_tokens} here.", "min_tokens")
    if sum(map(_num_logprobs, requests)) > MAX_LOGPROBS:
        raise bad_request(f"One request may ask for at most {MAX_LOGPROBS} log probabilities in all.", "logprobs")


def sampling_of(request: GenerateRequest, seed: int, vocab_size: int) -> Sampling:
    """OpenAI's defaults: temperature 1, no truncation. A top_k of -1 or 0 is none."""
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=bias_of(request, vocab_size),
        min_tokens=request.min_tokens or 0,
        seed=seed,
    )


def bias_of(request: GenerateRequest, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Tokens and what is added to their logits. Raises ApiError 400 for a key that is no token of the model."""
    biases = request.logit_bias or {}
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) < 20 and int(key) < vocab_size):
            raise bad_request(f"logit_bias: {key[:40]!r} is no token id of 0..{vocab_size - 1}.", "logit_bias")
    return tuple((int(key), bias) for key, bias in biases.items())


def logprobs_of(request: GenerateRequest) -> int | None:
    """The number of alternatives whose log probabilities are told beside each token's own; None: not even those.

    Raises ApiError 400 for top_logprobs without logprobs.
    """
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if not isinstance(request, ChatRequest) or not request.logprobs:
        if isinstance(request, ChatRequest) and request.top_logprobs:
            raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
        return None
    return request.top_logprobs or 0


def _num_logprobs(request: InferenceRequest) -> int:
    output = 0 if request.logprobs is None else request.max_tokens * (request.logprobs + 1)
    prompt = 0 if request.prompt_logprobs is None else len(request.prompt_tokens) * (request.prompt_logprobs + 1)
    return output + prompt


def derive_seed(seed: int, sample: int) -> int:
    """The seed of one of several samples: the first keeps the request's own, the others get unrelated ones (splitmix64)."""
    if sample == 0:
        return seed
    mixed = (seed + sample * 0x9E3779B97F4A7C15) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & _MASK_63


def max_tokens_of(request: GenerateRequest) -> tuple[str, int | None]:
    """The output limit and the name it came under; chat's newer name wins."""
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return "max_completion_tokens", request.max_completion_tokens
    return "max_tokens", request.max_tokens


def fit_max_tokens(request: GenerateRequest, prompt_len: int, model: ServedModel, limits: Limits) -> int:
    """The output limit; by default the remaining context for chat and 16 tokens for completions."""
    remaining = model.max_model_len - prompt_len
    name, asked = max_tokens_of(request)
    if remaining < (asked or 1):
        prompt_name = "prompt" if isinstance(request, CompletionRequest) else "messages"
        raise bad_request(
            f"The model's context is {model.max_model_len} tokens, but the prompt has {prompt_len} tokens and the answer "
            f"may have {asked or 'at least 1'}: shorten the prompt or lower {name}.",
            prompt_name if remaining < 1 else name,
            "context_length_exceeded",
        )
    if asked is not None and asked > limits.max_tokens_limit:
        raise bad_request(f"{name} must be at most {limits.max_tokens_limit}.", name, "integer_above_max_value")
    if asked is not None:
        return asked
    default = DEFAULT_COMPLETION_TOKENS if isinstance(request, CompletionRequest) else limits.max_tokens_limit
    return min(default, remaining)


def stops_of(request: GenerateRequest) -> tuple[str, ...]:
    """The stop strings as a tuple."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
