"""Which requests make sense for a model. Whoever publishes on the bus can send anything; knows no load and no sequence."""

from __future__ import annotations

import math

from common.messages import InferenceRequest


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
