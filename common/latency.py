"""How long an iteration takes: a piecewise linear function of its tokens, and its inverse. Pure; knows no clock.

f(rows, backward) = correction * (points(tokens) + context * ms_per_context_token + row_context * ms_per_row_context
                                  + scored * ms_per_scored_row)
                    + backward * backward_ms_per_token + head * drafter_ms_per_token
(FlexLLM's f(c, s), dossier 5.4). `points` come from a measurement of the real model on the real device. A segment's context is
read once, whatever its rows (`context`), and each of its rows attends to all of it (`row_context`): a prefill chunk of 32 rows
behind 6,000 tokens costs far more than 32 rows. Of a prompt only the last row needs the model's head, unless its rows are
`scored`: with a large vocabulary that costs as much as the rest of a small model.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import msgspec

from common.messages import LatencyProfile

MAX_SLOWER = 2.0
"""A pass that took more times what was predicted was held up by something else: points learn no more than this from it."""


class Rows(NamedTuple):
    """What a forward pass costs by: its rows, over its segments the sum of contexts and of rows times context, and the rows of
    prompts whose log probabilities are wanted.
    """

    tokens: int = 0
    context: int = 0
    row_context: int = 0
    scored: int = 0

    def with_segment(self, rows: int, context: int, scored: int = 0) -> Rows:
        """Beside a new segment of that many rows behind that context; one without rows is none. Up to `scored` are scored."""
        if rows <= 0:
            return self
        row_context = self.row_context + rows * context
        return Rows(self.tokens + rows, self.context + context, row_context, self.scored + min(rows, scored))

    def widened(self, rows: int, context: int) -> Rows:
        """With that many more rows in a segment that is there already, so that its context is read anyway."""
        return self._replace(tokens=self.tokens + rows, row_context=self.row_context + rows * context)


NO_ROWS = Rows()


def interpolate(points: tuple[tuple[int, float], ...], tokens: float) -> float:
    """ms of `tokens` tokens: linear between points, the first point's cost below them, the last slope above them."""
    if tokens <= points[0][0] or len(points) == 1:
        return points[0][1]
    i = min(bisect_right(points, tokens, key=lambda point: point[0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def predict_ms(profile: LatencyProfile, rows: Rows) -> float:
    """Predicted ms of a forward pass; 0 without rows."""
    if rows.tokens <= 0:
        return 0.0
    forward = interpolate(profile.points, rows.tokens)
    context_ms = rows.context * profile.ms_per_context_token + _row_context_ms(profile, rows)
    return profile.correction * (forward + context_ms + _scored_ms(profile, rows))


def max_rows(
    profile: LatencyProfile, budget_ms: float, limit: int, beside: Rows = NO_ROWS, context: int = 0, scored: int = 0
) -> int:
    """f inverted: the most rows, up to `limit`, that a new segment behind `context` tokens may have beside the rest of the pass
    for the pass to stay within `budget_ms`; 0 if not even one may. Its first `scored` rows are scored.
    """
    low, high = 0, max(limit, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if predict_ms(profile, beside.with_segment(middle, context, scored)) <= budget_ms:
            low = middle
        else:
            high = middle - 1
    return low


def make_profile(
    measured: list[tuple[int, float]],
    *,
    ms_per_context_token: float = 0.0,
    ms_per_row_context: float = 0.0,
    ms_per_scored_row: float = 0.0,
    backward_ms_per_token: float = 0.0,
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
        points=tuple(points),
        ms_per_context_token=ms_per_context_token,
        ms_per_row_context=ms_per_row_context,
        ms_per_scored_row=ms_per_scored_row,
        backward_ms_per_token=backward_ms_per_token,
    )


def context_costs(narrow: tuple[Rows, float], wide: tuple[Rows, float]) -> tuple[float, float]:
    """(ms_per_context_token, ms_per_row_context), neither below 0, from two passes of one segment behind a context: their rows,
    and by how many ms the context made each slower. `wide` has more rows than `narrow`, behind the same context.
    """
    (few, few_ms), (many, many_ms) = narrow, wide
    per_row = max(0.0, (many_ms - few_ms) / (many.row_context - few.row_context))
    return max(0.0, (few_ms - few.row_context * per_row) / few.context), per_row


def corrected(profile: LatencyProfile, rows: Rows, measured_ms: float, weight: float = 0.05) -> LatencyProfile:
    """The profile after a forward pass: an EWMA of measured / predicted, one observation bounded to a factor of 4.

    What attention to a context and scoring had as their shares of the prediction goes to their own coefficients: else a long
    prompt, whose cost per row was measured behind a shorter context, would spoil what is predicted of every other pass. The
    points beside the pass's size move as well, the first times by more: passes of one size say little of another's measurement.
    """
    predicted_ms = predict_ms(profile, rows)
    if predicted_ms <= 0 or measured_ms <= 0:
        return profile
    ratio = measured_ms / predicted_ms
    share = profile.correction * _row_context_ms(profile, rows) / predicted_ms
    scored_share = profile.correction * _scored_ms(profile, rows) / predicted_ms
    rest = 1.0 - share - scored_share
    correction = profile.correction * _smoothed(ratio, weight * rest)
    per_row = profile.ms_per_row_context * _smoothed(ratio, weight * share)
    per_scored = profile.ms_per_scored_row * _smoothed(ratio, weight * scored_share)
    points, seen = _corrected_points(profile, rows.tokens, ratio, weight, rest)
    return msgspec.structs.replace(
        profile,
        points=points,
        seen=seen,
        correction=min(10.0, max(0.1, correction)),
        ms_per_row_context=per_row,
        ms_per_scored_row=per_scored,
    )


def _corrected_points(
    profile: LatencyProfile, tokens: int, ratio: float, weight: float, share: float
) -> tuple[tuple[tuple[int, float], ...], tuple[float, ...]]:
    """The points and how often each was seen, after one more pass: the two beside its size move by their nearness to it."""
    seen = list(profile.seen or (0.0,) * len(profile.points))
    costs = [ms for _, ms in profile.points]
    for i, nearness in _beside(profile.points, tokens):
        costs[i] *= _smoothed(min(ratio, MAX_SLOWER), share * nearness * max(weight, 1.0 / (2.0 + seen[i])))
        seen[i] += nearness
        costs[:i] = [min(ms, costs[i]) for ms in costs[:i]]
        costs[i + 1 :] = [max(ms, costs[i]) for ms in costs[i + 1 :]]
    return tuple((size, ms) for (size, _), ms in zip(profile.points, costs, strict=True)), tuple(seen)


def _beside(points: tuple[tuple[int, float], ...], tokens: float) -> list[tuple[int, float]]:
    """Indices of the points beside a size, with weights that sum to one."""
    above = bisect_right(points, tokens, key=lambda point: point[0])
    if above == 0 or above == len(points):
        return [(min(above, len(points) - 1), 1.0)]
    (x0, _), (x1, _) = points[above - 1], points[above]
    nearness = (tokens - x0) / (x1 - x0)
    return [(above - 1, 1.0 - nearness), (above, nearness)]


def backward_corrected(profile: LatencyProfile, tokens: float, measured_ms: float, weight: float = 0.1) -> LatencyProfile:
    """The profile after `tokens` whole-model token equivalents of backward work took `measured_ms`."""
    if tokens <= 0 or measured_ms <= 0 or profile.backward_ms_per_token <= 0:
        return profile
    ratio = measured_ms / tokens / profile.backward_ms_per_token
    per_token = profile.backward_ms_per_token * _smoothed(ratio, weight)
    return msgspec.structs.replace(profile, backward_ms_per_token=per_token)


def drafter_ms_per_token(profile: LatencyProfile) -> float:
    """ms of as much training of a drafter's head as one token of a pass multiplies."""
    tokens, ms = profile.points[-1]
    return profile.drafter_correction * ms / tokens


def drafter_corrected(profile: LatencyProfile, tokens: float, measured_ms: float, weight: float = 0.2) -> LatencyProfile:
    """The profile after so much training of a drafter's head took `measured_ms`."""
    if tokens <= 0 or measured_ms <= 0:
        return profile
    ratio = measured_ms / tokens / drafter_ms_per_token(profile)
    return msgspec.structs.replace(profile, drafter_correction=profile.drafter_correction * _smoothed(ratio, weight))


def _row_context_ms(profile: LatencyProfile, rows: Rows) -> float:
    return rows.row_context * profile.ms_per_row_context


def _scored_ms(profile: LatencyProfile, rows: Rows) -> float:
    return rows.scored * profile.ms_per_scored_row


def _smoothed(ratio: float, weight: float) -> float:
    return 1.0 + weight * (min(4.0, max(0.25, ratio)) - 1.0)
