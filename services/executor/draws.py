"""Which drawn token belongs to which row of which sequence. Knows rows and positions, not probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

from services.executor.assembly import Work
from services.executor.sampling import Draws


class WorkDraws:
    """The target's tokens after the rows of one sequence that wanted logits, drawn when they are looked up."""

    def __init__(self, draws: Draws | None, first_row: int, work: Work) -> None:
        following = [position + 1 for position in work.segment.positions]
        self._positions = {"all": following, "last": following[-1:], "none": []}[work.segment.wants_logits]
        self._draws, self._first_row = draws, first_row
        self._sampling = work.sequence.request.sampling

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, row: int) -> int:
        if self._draws is None or not 0 <= row < len(self._positions):
            raise IndexError(row)
        return self._draws.token(self._first_row + row, self._sampling, self._positions[row])

    def __iter__(self) -> Iterator[int]:
        return (self[row] for row in range(len(self)))


def drawn_by(works: Seq[Work], draws: Draws | None) -> list[WorkDraws]:
    """The draws of each sequence; rows of a pass's logits are in the order of its segments."""
    found: list[WorkDraws] = []
    for work in works:
        found.append(WorkDraws(draws, sum(len(earlier) for earlier in found), work))
    return found
