"""Whether to draft on an executor at all, by what drafts brought there lately. Pure: times are arguments; knows no tree."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

GAIN_FORGETTING = 0.99
"""What drafts brought a request counts e times less after a hundred more drafts, of whatever requests."""
TRUST_FORGETTING = 0.998
TRUST_PRIOR = 4.0
"""Tokens that are taken as accepted just as expected, before there is evidence."""
PACE_FORGETTING = 0.95
PACE_PRIOR = 4.0
"""Iterations that are taken to last just as predicted, before there is evidence."""
MAX_SURPRISE = 3.0
"""An iteration that took more times what was predicted was held up by something else, and counts as this much."""
LEAST_GAIN = 1.08
"""Times as many tokens per ms as roots alone that drafts must bring: they also keep a core busy that others can use."""
LEAST_FREE_GAIN = 1.03
"""The same of drafters that compute no model: they keep no core busy."""
LEAST_PAYING_GAIN = 0.8
"""The same where drafts pay debts: what one request gains, all others must not pay for with more than this."""
DOUBTFUL_GAIN = 1.3
"""Below it, drafters that cost nothing are tried by themselves."""
PLAIN_TRIAL, FIRST_TRIAL, TRIAL_GAP, LONGEST_TRIAL_GAP = 8, 32, 128, 4096
"""So many iterations go without drafts, at first after so many with them, then after so many where drafts bring less than
DOUBTFUL_GAIN: what roots alone take is else only predicted, from passes that verified nodes, and that is too much. Ever more
rarely where no time is told, as beside finetuning.
"""
NUM_PROBED = 32
"""Drafts (requests times iterations) that are tried before they may be judged as not worth their time."""
NUM_GLANCED, GLANCED_ROUNDS, POOR_GAIN = 8, 3, 0.9
"""So many drafts, and iterations with them, are enough where they bring less than this."""
FIRST_REST, LONGEST_REST, LONGEST_FREE_REST = 16, 256, 64
"""Iterations without drafts after drafts did not pay; doubled each time that they still do not. Drafts that cost
nothing but the wait for them are probed more often, where others cost more.
"""
MAX_REGRET = 0.02
"""Share of the time that probing may lose: as far as the longest rest allows, a rest is so long that what the probe before it
lost is no more. Not while roots alone were never measured, as the rest does that, nor while requests are in debt.
"""

Tier = Literal["all", "free"]
"""Who drafts: all drafters, or those that compute no model."""


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """What a round of drafts was expected to bring, and its requests without it: times without other work."""

    num_requests: int
    tokens: float
    ms: float
    plain_ms: float
    num_in_debt: int
    num_paid: int
    """Of the requests in debt, those whose drafts pay for it."""


@dataclasses.dataclass(slots=True)
class _Pace:
    """Iterations of a kind: how long they took for each ms that was predicted."""

    predicted_ms: float = 0.0
    measured_ms: float = 0.0
    num: float = 0.0

    def observe(self, predicted_ms: float, measured_ms: float) -> None:
        self.predicted_ms = PACE_FORGETTING * self.predicted_ms + predicted_ms
        self.measured_ms = PACE_FORGETTING * self.measured_ms + min(measured_ms, MAX_SURPRISE * predicted_ms)
        self.num = PACE_FORGETTING * self.num + 1.0

    @property
    def ratio(self) -> float:
        if self.num == 0.0:
            return 1.0
        prior_ms = PACE_PRIOR * self.predicted_ms / self.num
        return (prior_ms + self.measured_ms) / (prior_ms + self.predicted_ms)


@dataclasses.dataclass(slots=True)
class _PlainPace:
    """Iterations without drafts: how long they took for each request in them."""

    measured_ms: float = 0.0
    num_requests: float = 0.0
    num: float = 0.0

    def observe(self, measured_ms: float, num_requests: int, predicted_ms: float) -> None:
        self.measured_ms = PACE_FORGETTING * self.measured_ms + min(measured_ms, MAX_SURPRISE * predicted_ms)
        self.num_requests = PACE_FORGETTING * self.num_requests + num_requests
        self.num = PACE_FORGETTING * self.num + 1.0

    def ratio(self, predicted_ms: float) -> float:
        """Times as long as the `predicted_ms` for each request."""
        if self.num_requests == 0.0 or predicted_ms <= 0.0:
            return 1.0
        ratio = self.measured_ms / self.num_requests / predicted_ms
        return (PACE_PRIOR + self.num * ratio) / (PACE_PRIOR + self.num)


@dataclasses.dataclass(slots=True)
class _Load:
    """What is known of drafting while about so many requests run."""

    num_left: int = 0
    """Iterations still to go without drafts."""
    next_rest: int = FIRST_REST
    num_in_debt: int = 0
    """When the rest began."""
    num_probed: int = 0
    num_rounds: int = 0
    """That these took."""
    tokens: float = 0.0
    ms: float = 0.0
    plain_tokens: float = 0.0
    plain_ms: float = 0.0
    paid: float = 0.0
    gain: float = 0.0
    """As of the last round that was judged; 0: none was."""
    age: int = 0
    """Iterations since then."""
    drafted: _Pace = dataclasses.field(default_factory=_Pace)
    plain: _PlainPace = dataclasses.field(default_factory=_PlainPace)
    next_trial: int = FIRST_TRIAL
    num_until_trial: int = FIRST_TRIAL
    """Iterations with drafts until roots alone are tried; below zero: so many of the trial are still to go."""

    def begin(self) -> None:
        """Drafts are tried (again): what they brought before counts no more."""
        self.num_left = self.num_probed = self.num_rounds = 0
        self.tokens = self.ms = self.plain_tokens = self.plain_ms = self.paid = 0.0

    @property
    def current_gain(self) -> float:
        """Times as many tokens per ms as roots alone."""
        return self.tokens * self.plain_ms * self._plain_ratio / (self.plain_tokens * self.ms * self.drafted.ratio)

    def num_redeeming(self, plain_ms: float) -> int:
        """Iterations of roots alone, predicted to take `plain_ms` each, of whose time MAX_REGRET is what drafting lost since it
        began: roots alone would have brought as many tokens in so much less time.
        """
        if plain_ms <= 0.0:
            return 0
        lost_ms = max(0.0, 1.0 - self.current_gain) * self.ms * self.drafted.ratio
        return math.ceil(lost_ms / (MAX_REGRET * plain_ms * self._plain_ratio))

    @property
    def _plain_ratio(self) -> float:
        return self.plain.ratio(self.plain_ms / self.plain_tokens)


def load_of(num_running: int) -> int:
    """Loads that are as good as the same: two steps for each doubling."""
    return round(2.0 * math.log2(max(1, num_running)))


class _Arm:
    """One way to draft. Each load has a record of its own, so that load which comes and goes is not probed anew.

    What drafts bring is what they are expected to, times the share of such expectations that came true: less noisy than what
    was accepted in a few steps, and true in the end. So it is with the time that iterations take.
    """

    def __init__(self, longest_rest: int) -> None:
        self._longest_rest = longest_rest
        self._loads: dict[int, _Load] = {}
        self.load = _Load()
        self._pending = 0.0
        """Tokens that the last drafts were expected to bring beyond the roots'; not judged yet."""
        self._accepted = self._expected = 0.0
        self._pace: _Pace | _PlainPace | None = None
        self._predicted_ms = 0.0
        self._num_requests = 0

    def judge(self, num_accepted: int, num_requests: int, measured_ms: float | None, *, is_late: bool) -> None:
        if measured_ms is not None:
            if isinstance(self._pace, _PlainPace):
                self._pace.observe(measured_ms, self._num_requests, self._predicted_ms)
            elif self._pace is not None and not (is_late and self._pending > 0.0):
                self._pace.observe(self._predicted_ms, measured_ms)
        self._pace = None
        if self._pending <= 0.0:
            return
        kept = TRUST_FORGETTING**num_requests
        self._accepted = kept * self._accepted + num_accepted
        self._expected = kept * self._expected + self._pending
        self._pending = 0.0

    def rests(self, num_running: int, num_in_debt: int, num_iterations: int) -> bool:
        load = self.load = self._loads.setdefault(load_of(num_running), _Load())
        if load.num_left > 0 and num_in_debt > 0 and load.num_in_debt == 0:
            load.begin()
        if load.num_left == 0:
            return False
        self.pass_by(num_iterations)
        return True

    def pass_by(self, num_iterations: int) -> None:
        """They were part of the rest, if there is one."""
        load = self.load
        if load.num_until_trial < 0:
            load.num_until_trial = min(0, load.num_until_trial + num_iterations)
        if load.num_left > 0:
            load.num_left = max(0, load.num_left - num_iterations)
            if load.num_left == 0:
                load.begin()

    def tries_plain(self, num_iterations: int, num_in_debt: int) -> bool:
        """Whether this iteration is one of a trial of roots alone: not while a request needs what drafts bring."""
        load = self.load
        if num_in_debt > 0:
            is_due = load.num_until_trial > 0
            load.num_until_trial = max(1, load.num_until_trial - num_iterations) if is_due else load.next_trial
            return False
        if load.num_until_trial > 0:
            load.num_until_trial -= num_iterations
            if load.num_until_trial > 0:
                return False
            is_wanted = load.plain.num == 0.0 or 0.0 < load.gain < DOUBTFUL_GAIN
            load.num_until_trial = -PLAIN_TRIAL if is_wanted else TRIAL_GAP
            return is_wanted
        load.num_until_trial += num_iterations
        if load.num_until_trial < 0:
            return True
        is_measured = load.plain.num > 0.0
        load.next_trial = TRIAL_GAP if is_measured else min(4 * load.next_trial, LONGEST_TRIAL_GAP)
        load.num_until_trial = load.next_trial
        return False

    def skip(self, plain_ms: float, num_requests: int) -> None:
        """Roots alone are decoded."""
        self._pace, self._predicted_ms, self._num_requests = self.load.plain, plain_ms, num_requests

    def observe(self, last: Round, least_gain: float) -> None:
        load = self.load
        self._pending = last.tokens - last.num_requests
        self._pace, self._predicted_ms = load.drafted, last.ms
        kept = GAIN_FORGETTING**last.num_requests
        trust = (TRUST_PRIOR + self._accepted) / (TRUST_PRIOR + self._expected)
        load.tokens = kept * load.tokens + last.num_requests + trust * self._pending
        load.ms = kept * load.ms + last.ms
        load.plain_tokens = kept * load.plain_tokens + last.num_requests
        load.plain_ms = kept * load.plain_ms + last.plain_ms
        load.paid = kept * load.paid + last.num_paid
        load.num_probed += last.num_requests
        load.num_rounds += 1
        is_glanced = load.num_probed >= NUM_GLANCED and load.num_rounds >= GLANCED_ROUNDS
        if load.num_probed < NUM_PROBED and not (is_glanced and load.current_gain < POOR_GAIN):
            return
        load.gain, load.age = load.current_gain, 0
        if load.gain > least_gain or (load.paid >= 0.5 and load.gain > LEAST_PAYING_GAIN):
            load.next_rest = FIRST_REST
            return
        is_redeemed = load.plain.num > 0.0 and last.num_in_debt == 0
        load.num_left = min(self._longest_rest, max(load.next_rest, load.num_redeeming(last.plain_ms) if is_redeemed else 0))
        load.next_rest = min(self._longest_rest, 2 * load.next_rest)
        load.num_in_debt = last.num_in_debt


class Pacing:
    """Of one executor. Drafting costs time before any node is verified: what it brought lately is held against decoding roots
    alone, and where that is faster and no debt is paid, drafting rests and is probed ever more rarely.

    Where some drafters cost next to nothing, these go on while the others rest, or rest by themselves. They are also tried
    where all together bring little, which then must bring more than they do.
    """

    def __init__(self, *, has_free: bool = False, is_free: bool = False) -> None:
        """`has_free`: some drafters cost nothing, and some do; `is_free`: none costs anything."""
        self._all = _Arm(LONGEST_REST)
        self._least_gain = LEAST_FREE_GAIN if is_free else LEAST_GAIN
        self._least_hope = LEAST_FREE_GAIN if is_free or has_free else LEAST_GAIN
        self._free = _Arm(LONGEST_FREE_REST) if has_free else None
        self._chosen: _Arm | None = None
        self._num_hopeless = 0
        """Iterations for which drafts were not even probed."""

    @property
    def num_left(self) -> int:
        """Iterations still to go without drafts, while the load is what it is."""
        if self._num_hopeless > 0:
            return min(FIRST_REST, max(0, LONGEST_REST - self._num_hopeless))
        if self._chosen is None and self._all.load.num_until_trial < 0:
            return -self._all.load.num_until_trial - 1
        return min(arm.load.num_left for arm in (self._all, self._free) if arm is not None)

    def judge(self, num_accepted: int, num_requests: int, measured_ms: float | None, *, is_late: bool = False) -> None:
        """What the last round came to: its drafts may have been wrong or, `is_late`, not verified at all, which is as bad, but
        tells nothing about the time that it takes to verify them. None: its time tells nothing.
        """
        for arm in (self._all, self._free):
            if arm is not None:
                arm.judge(num_accepted, num_requests, measured_ms, is_late=is_late)

    def pass_by(self, num_iterations: int) -> None:
        """A report that nobody drafts for, of so many iterations."""
        for arm in (self._all, self._free):
            if arm is not None:
                arm.pass_by(num_iterations)

    def choose(
        self, num_running: int, num_in_debt: int, plain_ms: float, most_gain: float = math.inf, num_iterations: int = 1
    ) -> Tier | None:
        """Who drafts for this report, which comes `num_iterations` after the last one; None: nobody, and its iteration takes
        `plain_ms`. Debts end a rest that began without any. Where drafts cannot bring enough even if they are guessed well,
        `most_gain`, they are probed after LONGEST_REST iterations alone: what is known of the time may be wrong.
        """
        is_hopeless = most_gain < (LEAST_PAYING_GAIN if num_in_debt else self._least_hope) and self._num_hopeless < LONGEST_REST
        self._num_hopeless = self._num_hopeless + num_iterations if is_hopeless else 0
        if is_hopeless:
            self._chosen = None
            return None
        rests = self._all.rests(num_running, num_in_debt, num_iterations)
        if self._free is None:
            self._chosen = None if rests else self._all
        else:
            free_rests = self._free.rests(num_running, num_in_debt, num_iterations)
            load, free = self._all.load, self._free.load
            free.age += num_iterations
            in_doubt = 0.0 < load.gain < DOUBTFUL_GAIN and (free.gain == 0.0 or free.age > LONGEST_REST)
            is_trial = not free_rests and num_in_debt == 0 and (in_doubt or 0 < free.num_probed < NUM_PROBED)
            self._chosen = self._free if is_trial or (rests and not free_rests) else None if rests else self._all
        if self._chosen is self._all and self._all.tries_plain(num_iterations, num_in_debt):
            self._chosen = None
        if self._chosen is None:
            for arm in (self._all, self._free):
                if arm is not None:
                    arm.skip(plain_ms, num_running)
            return None
        return "free" if self._chosen is self._free else "all"

    def observe(self, last: Round) -> None:
        """A round of drafts was made by those who were chosen; it may have been their last before a rest."""
        if self._chosen is self._free and self._free is not None:
            self._free.observe(last, LEAST_FREE_GAIN)
        else:
            others = self._free.load.gain if self._free is not None else 0.0
            self._all.observe(last, self._least_gain * max(1.0, others))
