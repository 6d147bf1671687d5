"""AdaServe's numbers for one iteration: debt of a request, depth and width of drafts, and whether to draft at all. Pure."""

from __future__ import annotations

import dataclasses
import math

PRIOR_RATE, PRIOR_TRIALS = 0.8, 4.0
"""What is believed of a new sequence's drafts: deep enough to find out."""
FORGETTING = 0.9
"""A verify step counts e times less after ten more: text changes its kind."""
ROUNDING = 1e-9
GAIN_FORGETTING = 0.99
"""What drafts brought a request counts e times less after a hundred more drafts, of whatever requests."""
TRUST_FORGETTING = 0.998
TRUST_PRIOR = 4.0
"""Tokens that are taken as accepted just as expected, before there is evidence."""
NUM_PROBED = 32
"""Drafts (requests times iterations) that are tried before they may be judged as not worth their time."""
FIRST_REST, LONGEST_REST = 16, 128
"""Reports that are answered without drafts after drafts did not pay; doubled each time that they still do not."""


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


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """What a round of drafts was expected to bring, and its requests without it."""

    num_requests: int
    num_running: int
    """All that decode there: more than were drafted for, where these take turns."""
    tokens: float
    ms: float
    plain_ms: float
    num_in_debt: int
    num_paid: int
    """Of the requests in debt, those whose drafts pay for it."""


@dataclasses.dataclass(slots=True)
class Pacing:
    """Whether to draft on one executor at all. Drafting costs time before any node is verified: what it brought lately is held
    against decoding roots alone, and where that is faster and no debt is paid, drafting rests and is probed ever more rarely.

    What drafts bring is what they are expected to, times the share of such expectations that came true: less noisy than what
    was accepted in a few steps, and true in the end.
    """

    num_left: int = 0
    """Reports still to be answered without drafts."""
    next_rest: int = FIRST_REST
    num_running: int = 0
    """When the rest began; likewise `num_in_debt`."""
    num_in_debt: int = 0
    num_probed: int = 0
    tokens: float = 0.0
    ms: float = 0.0
    plain_tokens: float = 0.0
    plain_ms: float = 0.0
    paid: float = 0.0
    pending: float = 0.0
    """Tokens that the last drafts were expected to bring beyond the roots'; not judged yet."""
    accepted: float = 0.0
    expected: float = 0.0

    def judge(self, num_accepted: int, num_requests: int) -> None:
        """What the last drafts came to, which may have been late as well as wrong."""
        if self.pending <= 0.0:
            return
        kept = TRUST_FORGETTING**num_requests
        self.accepted = kept * self.accepted + num_accepted
        self.expected = kept * self.expected + self.pending
        self.pending = 0.0

    def rests(self, num_running: int, num_in_debt: int) -> bool:
        """Whether this report is answered without drafts. Load that changed by a quarter, or a new debt, ends a rest."""
        if self.num_left <= 0:
            return False
        if 4 * abs(num_running - self.num_running) > self.num_running or num_in_debt > self.num_in_debt:
            self._begin()
            self.next_rest = FIRST_REST
            return False
        self.num_left -= 1
        if self.num_left == 0:
            self._begin()
        return True

    def observe(self, last: Round) -> None:
        """A round of drafts was made; it may have been the last before a rest."""
        kept = GAIN_FORGETTING**last.num_requests
        self.pending = last.tokens - last.num_requests
        trust = (TRUST_PRIOR + self.accepted) / (TRUST_PRIOR + self.expected)
        self.tokens = kept * self.tokens + last.num_requests + trust * self.pending
        self.ms = kept * self.ms + last.ms
        self.plain_tokens = kept * self.plain_tokens + last.num_requests
        self.plain_ms = kept * self.plain_ms + last.plain_ms
        self.paid = kept * self.paid + last.num_paid
        self.num_probed += last.num_requests
        if self.num_probed < NUM_PROBED:
            return
        if self.tokens * self.plain_ms > self.plain_tokens * self.ms or self.paid >= 0.5:
            self.next_rest = FIRST_REST
            return
        self.num_left, self.next_rest = self.next_rest, min(LONGEST_REST, 2 * self.next_rest)
        self.num_running, self.num_in_debt = last.num_running, last.num_in_debt

    def _begin(self) -> None:
        self.num_left = self.num_probed = 0
        self.tokens = self.ms = self.plain_tokens = self.plain_ms = self.paid = 0.0
