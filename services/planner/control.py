"""AdaServe's numbers for one iteration: debt of a request, depth and width of drafts. Pure; knows no candidates."""

from __future__ import annotations


def token_debt(decode_ms: float, t_spec_ms: float, tpot_ms: float | None, num_decoded: int) -> float:
    """A(r), formula 2 solved for acc: the tokens that must land in an iteration of `t_spec_ms`; at least 1, the root's own.

    `num_decoded` tokens took `decode_ms` so far. A request without a target owes nothing but its root.
    """
    if tpot_ms is None:
        return 1.0
    return max(1.0, (decode_ms + t_spec_ms) / tpot_ms - num_decoded)


def draft_depth(num_nodes: int, num_requests: int, *, offset: float, least: int, most: int) -> int:
    """Formula 8 with B1 = num_nodes + num_requests verified tokens (roots count): a chain per request uses its mean share."""
    share = (num_nodes + num_requests) // max(1.0, num_requests + offset)
    return int(min(most, max(least, share - 1)))


def draft_width(num_draft_tokens: int, num_requests: int, *, offset: int, most: int) -> int:
    """Formula 9: beams per request, from the tokens that the drafter can extend in one step."""
    return min(most, max(1, num_draft_tokens // max(1, num_requests) + offset))


def quota_limit(num_nodes: int, num_requests: int) -> int:
    """n_max of the paper's code: no request takes more than 1.2 times its share of the budget for its SLO."""
    return max(1, int(1.2 * num_nodes / max(1, num_requests)))
