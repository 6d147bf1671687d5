"""Which tokens and log probabilities belong to which rows of which sequence. Knows rows, positions and paths, not chances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

from torch import Tensor

from common.messages import Logprobs, Sampling
from services.executor.assembly import Work
from services.executor.logits import restricted
from services.executor.logprobs import score, score_blocks
from services.executor.sampling import Draws


class WorkDraws:
    """The target's tokens after the rows of one sequence that wanted logits, drawn when they are looked up.

    Every token that is looked up becomes part of the output, in this order: so a grammar advances with them, and only sees
    the accepted path of a tree.
    """

    def __init__(
        self, work: Work, draws: Draws | None, first_row: int, hidden_RH: Tensor, logits: Callable[[Tensor], Tensor]
    ) -> None:
        following = [position + 1 for position in work.segment.positions]
        self._positions = {"all": following, "last": following[-1:], "none": []}[work.segment.wants_logits]
        self._draws, self._first_row = draws, first_row
        self._segment, self._sequence, self._is_decode = work.segment, work.sequence, work.is_decode
        self._hidden_RH, self._logits = hidden_RH, logits

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, row: int) -> int:
        if self._draws is None or not 0 <= row < len(self._positions):
            raise IndexError(row)
        sampling, grammar = self._sequence.request.sampling, self._sequence.grammar
        token = self._draws.token(self._first_row + row, sampling, self._positions[row], self._change(row))
        if grammar is not None:
            grammar.advance(token)
        return token

    def __iter__(self) -> Iterator[int]:
        return (self[row] for row in range(len(self)))

    def plain_rows(self) -> Iterator[tuple[int, Sampling, int]]:
        """Row, sampling and position of tokens that depend on nothing drawn before them, so that they can be drawn together."""
        if self._sequence.processor is None and self._sequence.grammar is None:
            for row, position in enumerate(self._positions):
                yield self._first_row + row, self._sequence.request.sampling, position

    def changed_rows(self) -> range:
        """The other rows."""
        is_plain = self._sequence.processor is None and self._sequence.grammar is None
        return range(self._first_row, self._first_row + (0 if is_plain else len(self._positions)))

    def logprobs(self, path: Seq[int], tokens: Seq[int]) -> Logprobs | None:
        """Of the committed tokens that were drawn along this path of nodes; None if nobody asks."""
        num_top = self._sequence.request.logprobs
        if num_top is None or self._draws is None:
            return None
        rows = [self._first_row + node for node in (0, *path)[: len(tokens)]]
        return score(self._draws.logits_RV[rows], tokens, num_top)

    def prompt_logprobs(self) -> Iterator[Logprobs]:
        """Of the prompt tokens after the rows of a prefill chunk that were not told yet, in pieces; none if nobody asks.

        Raises NonFiniteLogitsError.
        """
        sequence, start = self._sequence, self._segment.positions[0]
        num_top = sequence.request.prompt_logprobs
        if num_top is None or self._is_decode:
            return
        first, end = max(start, sequence.num_scored - 1), min(start + len(self._hidden_RH), sequence.num_prompt - 1)
        following = sequence.tokens[first + 1 : end + 1]
        for scores in score_blocks(self._logits, self._hidden_RH[first - start : end - start], following, num_top):
            sequence.num_scored += len(scores.chosen)
            yield scores

    def _change(self, row: int) -> Callable[[Tensor], Tensor] | None:
        """What happens to the row's logits before a token is drawn: first the constraint, then the request's own wishes."""
        process, grammar = self._sequence.processor, self._sequence.grammar
        allowed_V = None if grammar is None else grammar.allowed()
        if allowed_V is None and process is None:
            return None

        def change(logits_V: Tensor) -> Tensor:
            possible_V = logits_V if allowed_V is None else restricted(logits_V, allowed_V)
            return possible_V if process is None else process.apply(possible_V, self._output_before(row))

        return change

    def _output_before(self, row: int) -> list[int]:
        """The output that the token after this row follows: what is committed, then the row's ancestors in the tree."""
        parents, path, node = self._segment.parents, [], row
        while parents is not None and node > 0:
            path.append(self._segment.tokens[node])
            node = parents[node]
        return self._sequence.output + path[::-1]


def drawn_by(
    works: Seq[Work], draws: Draws | None, starts: Seq[int], hidden_TH: Tensor, logits: Callable[[Tensor], Tensor]
) -> list[WorkDraws]:
    """The draws of each sequence, whose rows begin at `starts`; `draws` holds the rows that wanted logits, in this order."""
    found: list[WorkDraws] = []
    first_row = 0
    for work, start in zip(works, starts, strict=False):  # windows of finetuning follow
        hidden_RH = hidden_TH[start : start + len(work.segment.tokens)]
        found.append(WorkDraws(work, draws, first_row, hidden_RH, logits))
        first_row += len(found[-1])
    if draws is not None:
        changed = [row for drawn in found for row in drawn.changed_rows()]
        draws.draw_ahead((each for drawn in found for each in drawn.plain_rows()), changed)
    return found
