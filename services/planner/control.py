"""AdaServe's numbers for one iteration: debt of a request, depth and width of its drafts. Pure; knows no time that passed."""

from __future__ import annotations

import dataclasses
import math

PRIOR_RATE, PRIOR_TRIALS = 0.8, 4.0
"""What is believed of a new sequence's drafts: deep enough to find out."""
FORGETTING = 0.9
"""A verify step counts e times less after ten more: text changes its kind."""
LIKELIEST = 0.9
"""No drafter's best guesses are accepted more often, level after level, of many requests at once."""
ROUNDING = 1e-9


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


def least_worth(num_requests: int, plain_ms: float, node_ms: float, level_ms: float) -> float:
    """Tokens that a node one level deeper must bring to pay for its row and for its share of drafting that level.

    Without drafts `num_requests` tokens take `plain_ms`; one more row takes `node_ms`, one more level for all `level_ms`.
    """
    return (num_requests * max(0.0, node_ms) + level_ms) / plain_ms if plain_ms > 0 else 0.0


def most_gain(plain_ms: float, level_rows_ms: float, most: int) -> float:
    """Times as many tokens per ms as roots alone that drafts can bring: of a chain for each request, as deep as is best and at
    most `most`, whose nodes are accepted as LIKELIEST says. A level of all chains takes `level_rows_ms` more than `plain_ms`.
    """
    if plain_ms <= 0.0:
        return math.inf
    tokens, best = 1.0, 0.0
    for depth in range(1, most + 1):
        tokens += LIKELIEST**depth
        best = max(best, tokens * plain_ms / (plain_ms + depth * level_rows_ms))
    return best


def useful_depth(rate: float, worth: float, most: int) -> int:
    """Levels, from 1 to `most`, whose best node is still accepted with probability `worth`, if each level is with `rate`."""
    if worth <= 0.0 or rate >= 1.0:
        return most
    if worth >= 1.0 or rate <= 0.0:
        return min(most, 1)
    return min(most, max(1, math.floor(math.log(worth) / math.log(rate))))


def useful_width(rate: float, worth: float, most: int) -> int:
    """Nodes of a level, from 1 to `most`, that can be accepted with probability `worth`, if its best one is with `rate`: the
    k-th best has at most a (k - 1)-th of what that leaves.
    """
    return most if worth <= 0.0 else min(most, 1 + math.floor((1.0 - rate) / worth + ROUNDING))


@dataclasses.dataclass(slots=True)
class AcceptRate:
    """How likely a request's next drafted level is accepted, after the ones before it: a mean that forgets."""

    hits: float = 0.0
    trials: float = 0.0

    @property
    def rate(self) -> float:
        """In (0, 1]."""
        return (PRIOR_RATE * PRIOR_TRIALS + self.hits) / (PRIOR_TRIALS + self.trials)

    def observe(self, accepted_len: int, num_drafted: int) -> None:
        """A tree was verified: so many levels were accepted, and unless it ended there, the next was not."""
        if num_drafted <= 0:
            return
        self.hits = FORGETTING * self.hits + accepted_len
        self.trials = FORGETTING * self.trials + accepted_len + (accepted_len < num_drafted)
