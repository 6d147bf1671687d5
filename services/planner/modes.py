"""The ways to choose draft trees, as switches of the one pipeline. Knows no request."""

from __future__ import annotations

import dataclasses

from common.speculation import parse_speculation
from services.planner.selection import QuotaOrder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """How trees are chosen: who is served first when the budget is short, whether it ends where more nodes do not pay."""

    order: QuotaOrder = "cheapest"
    has_stop_rule: bool = False
    """Whether nodes, and drafting as such, end where they lower the expected tokens per ms."""
    has_quotas: bool = False
    """Whether debts are paid first."""
    has_rest: bool = True
    """Whether nodes that no debt needs are taken."""
    is_equal: bool = False
    """Whether every request gets the same share of the budget, whatever it needs."""
    chain_length: int | None = None
    """A chain of so many tokens for every request, in place of trees."""
    is_calibrated: bool = False
    """Whether probabilities and depths are learned from what was accepted."""


MODES: dict[str, Mode | None] = {
    "heddle": Mode(has_stop_rule=True, has_quotas=True, is_calibrated=True),
    "adaserve": Mode(order="slowest", has_quotas=True),
    "throughput": Mode(has_stop_rule=True, is_calibrated=True),
    "slo": Mode(has_quotas=True, has_rest=False, is_calibrated=True),
    "equal": Mode(is_equal=True),
    "none": None,
}


def make_mode(text: str) -> Mode | None:
    """The mode of this spelling; None: no speculation. Raises ValueError for one that does not exist."""
    speculation = parse_speculation(text)
    if speculation.chain_length is not None:
        return Mode(chain_length=speculation.chain_length)
    return MODES[speculation.name]
