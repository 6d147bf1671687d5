"""Which requests make sense for a model. Whoever publishes on the bus can send anything; knows no load and no sequence."""

from __future__ import annotations

import math

from common.messages import InferenceRequest, Rejected


def find_fault(request: InferenceRequest, vocab_size: int) -> str | None:
    """What makes the request impossible to run, whatever else runs; None if nothing does."""
    prompt, sampling, slo = request.prompt_tokens, request.sampling, request.slo
    if not prompt or request.max_tokens - request.num_generated < 1:
        return "a request needs at least one prompt token and one output token"
    if not 0 <= request.num_generated < len(prompt):
        return f"num_generated must be 0..{len(prompt) - 1}: part of the prompt, and not all of it"
    if any(not 0 <= token < vocab_size for token in prompt):
        return f"prompt tokens must be in 0..{vocab_size - 1}"
    # Each condition is true of NaN, which would otherwise reach the scheduler's arithmetic.
    if not sampling.temperature >= 0.0 or not 0.0 <= sampling.top_p <= 1.0:
        return "temperature must be at least 0, top_p in [0, 1]"
    if any(target is not None and not target > 0.0 for target in (slo.tpot_ms, slo.ttft_ms)):
        return "slo: targets must be positive"
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
