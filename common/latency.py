"""How long an iteration takes: a piecewise linear function of its tokens, and its inverse. Pure; knows no clock.

f(tokens, context, backward) = correction * (points(tokens) + context * ms_per_context_token) + backward * backward_ms_per_token
(FlexLLM's f(c, s), dossier 5.4). `points` come from a measurement of the real model on the real device.
"""

from __future__ import annotations

from bisect import bisect_right

import msgspec

from common.messages import LatencyProfile


def interpolate(points: tuple[tuple[int, float], ...], tokens: float) -> float:
    """ms of `tokens` tokens: linear between points, the first point's cost below them, the last slope above them."""
    if tokens <= points[0][0] or len(points) == 1:
        return points[0][1]
    i = min(bisect_right(points, tokens, key=lambda point: point[0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def predict_ms(profile: LatencyProfile, tokens: int, context_tokens: int = 0, backward_tokens: int = 0) -> float:
    """Predicted ms of an iteration; `backward_tokens` are whole-model equivalents (tokens times share of layers)."""
    if tokens <= 0 and backward_tokens <= 0:
        return 0.0
    forward = interpolate(profile.points, tokens) if tokens > 0 else 0.0
    forward += context_tokens * profile.ms_per_context_token
    return profile.correction * forward + backward_tokens * profile.backward_ms_per_token


def max_tokens(profile: LatencyProfile, budget_ms: float, limit: int, context_tokens: int = 0) -> int:
    """The largest token count up to `limit` whose predicted latency is within `budget_ms`; 0 if none is."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if predict_ms(profile, middle, context_tokens) <= budget_ms:
            low = middle
        else:
            high = middle - 1
    return low


def make_profile(
    measured: list[tuple[int, float]], *, ms_per_context_token: float = 0.0, backward_ms_per_token: float = 0.0
) -> LatencyProfile:
    """A profile from (tokens, ms) measurements: sorted, and made monotone, since noise must not make more tokens cheaper.

    Raises ValueError without measurements or with non-positive ones.
    """
    if not measured or any(tokens <= 0 or ms <= 0 for tokens, ms in measured):
        raise ValueError(f"a latency profile needs positive measurements, got {measured}")
    points: list[tuple[int, float]] = []
    for tokens, ms in sorted(measured):
        points.append((tokens, max(ms, points[-1][1] if points else ms)))
    return LatencyProfile(
        points=tuple(points), ms_per_context_token=ms_per_context_token, backward_ms_per_token=backward_ms_per_token
    )


def corrected(profile: LatencyProfile, predicted_ms: float, measured_ms: float, weight: float = 0.05) -> LatencyProfile:
    """The profile after a forward pass: an EWMA of measured / predicted, one observation bounded to a factor of 4."""
    if predicted_ms <= 0 or measured_ms <= 0:
        return profile
    correction = profile.correction * _smoothed(measured_ms / predicted_ms, weight)
    return msgspec.structs.replace(profile, correction=min(10.0, max(0.1, correction)))


def backward_corrected(profile: LatencyProfile, tokens: float, measured_ms: float, weight: float = 0.1) -> LatencyProfile:
    """The profile after `tokens` whole-model token equivalents of backward work took `measured_ms`."""
    if tokens <= 0 or measured_ms <= 0 or profile.backward_ms_per_token <= 0:
        return profile
    ratio = measured_ms / tokens / profile.backward_ms_per_token
    per_token = profile.backward_ms_per_token * _smoothed(ratio, weight)
    return msgspec.structs.replace(profile, backward_ms_per_token=per_token)


def _smoothed(ratio: float, weight: float) -> float:
    return 1.0 + weight * (min(4.0, max(0.25, ratio)) - 1.0)
