"""Which requests make sense for a model. Whoever publishes on the bus can send anything; knows no load and no sequence."""

from __future__ import annotations

import math

from common.messages import MAX_LOGIT_BIAS, MAX_SALT_CHARS, MAX_TOP_LOGPROBS, InferenceRequest, Rejected, Sampling


def find_fault(request: InferenceRequest, vocab_size: int) -> str | None:
    """What makes the request impossible to run, whatever else runs; None if nothing does."""
    prompt, sampling, slo = request.prompt_tokens, request.sampling, request.slo
    if not prompt or request.max_tokens - request.num_generated < 1:
        return "a request needs at least one prompt token and one output token"
    if not 0 <= request.num_generated < len(prompt):
        return f"num_generated must be 0..{len(prompt) - 1}: part of the prompt, and not all of it"
    if any(not 0 <= token < vocab_size for token in prompt):
        return f"prompt tokens must be in 0..{vocab_size - 1}"
    if fault := _sampling_fault(sampling, vocab_size, request.max_tokens):
        return fault
    for name, number in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if number is not None and not 0 <= number <= MAX_TOP_LOGPROBS:
            return f"{name} must be in 0..{MAX_TOP_LOGPROBS}"
    # Each condition is true of NaN, which would otherwise reach the scheduler's arithmetic.
    if any(target is not None and not target > 0.0 for target in (slo.tpot_ms, slo.ttft_ms)):
        return "slo: targets must be positive"
    if len(request.cache_salt) > MAX_SALT_CHARS:
        return f"cache_salt must have at most {MAX_SALT_CHARS} characters"
    if not math.isfinite(request.arrived_at):
        return "arrived_at must be a time"
    return None


def refusal(request: InferenceRequest, vocab_size: int, max_model_len: int) -> Rejected | None:
    """Why this model can never run the request; None if it can."""
    if fault := find_fault(request, vocab_size):
        return Rejected(reason="invalid", message=fault)
    num_tokens = len(request.prompt_tokens)
    if num_tokens + request.max_tokens - request.num_generated > max_model_len:
        message = f"{num_tokens} prompt and {request.max_tokens} output tokens exceed the limit of {max_model_len}"
        return Rejected(reason="too_long", message=message)
    return None


def _sampling_fault(sampling: Sampling, vocab_size: int, max_tokens: int) -> str | None:
    """Each condition is false of NaN."""
    biases = [bias for _, bias in sampling.logit_bias]
    valid = {
        "temperature must be at least 0": sampling.temperature >= 0.0,
        "top_p must be in [0, 1]": 0.0 <= sampling.top_p <= 1.0,
        "min_p must be in [0, 1]": 0.0 <= sampling.min_p <= 1.0,
        "repetition_penalty must be positive": 0.0 < sampling.repetition_penalty < math.inf,
        "presence_penalty must be in [-2, 2]": -2.0 <= sampling.presence_penalty <= 2.0,
        "frequency_penalty must be in [-2, 2]": -2.0 <= sampling.frequency_penalty <= 2.0,
        f"logit_bias must have at most {MAX_LOGIT_BIAS} tokens": len(biases) <= MAX_LOGIT_BIAS,
        f"logit_bias: tokens must be in 0..{vocab_size - 1}": all(0 <= token < vocab_size for token, _ in sampling.logit_bias),
        "logit_bias: values must be in [-100, 100]": all(-100.0 <= bias <= 100.0 for bias in biases),
        "min_tokens must be in 0..max_tokens": 0 <= sampling.min_tokens <= max_tokens,
    }
    return next((fault for fault, holds in valid.items() if not holds), None)
