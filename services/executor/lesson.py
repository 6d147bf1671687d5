"""One sequence that a drafter learns from: the target's hidden states and what it would say. Knows no head and no job.

Shapes: W rows of a window, F features of all layers side by side, k favourites; rows without a weight have no favourites.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.messages import TrainingSlice
from kernels.drafting.training import NUM_FAVOURITES, Truth, liked
from services.executor.model import Decoder

MAX_LOGIT_ROWS = 64
"""Rows whose logits of the whole vocabulary are in memory at once."""


class ReducedVocabulary:
    """The tokens that a drafter can say, and the place of every token among them; all others share the last place."""

    def __init__(self, tokens: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self.tokens = tuple(tokens)
        self.tokens_V = torch.tensor(self.tokens, device=device)
        self.places = torch.full((vocab_size,), len(self.tokens), device=device)
        self.places[self.tokens_V] = torch.arange(len(self.tokens), device=device)

    @property
    def other(self) -> int:
        """The place of tokens that it cannot say."""
        return len(self.tokens)


class LessonSequence:
    """A slice in work; `num_rows` ends before the last predicted token. Its windows leave no tape: nothing goes back."""

    tape = None
    dropout = None

    def __init__(self, item: TrainingSlice, decoder: Decoder, layers: tuple[int, ...], vocabulary: ReducedVocabulary) -> None:
        device, num_favourites = decoder.device, min(NUM_FAVOURITES, vocabulary.other)
        self.item, self.tokens, self.layers = item, item.tokens, layers
        self.num_rows = max((i for i, weight in enumerate(item.weights) if i and weight), default=0)
        self.num_forwarded = 0
        self.slots_T = torch.empty(0, dtype=torch.int64, device=device)
        self.losses: list[float] = []
        self.num_correct = 0
        self.trained = tuple(i - 2 for i in range(2, self.num_rows + 1) if item.weights[i])
        """Rows whose first guess has a weight: row i reads the token i + 1 and guesses the next one."""
        self.num_tokens = len(self.trained)
        self.places_T = vocabulary.places[torch.tensor(item.tokens, device=device)]
        self.weights_T = torch.tensor(item.weights, device=device)
        self.features_TF = torch.zeros(
            self.num_rows, len(layers) * decoder.config.hidden_size, dtype=torch.bfloat16, device=device
        )
        self._favourites_T = torch.full((self.num_rows,), vocabulary.other, device=device)
        self._top_Tk = torch.zeros(self.num_rows, num_favourites, dtype=torch.int32, device=device)
        self._probs_Tk = torch.zeros(self.num_rows, num_favourites, dtype=torch.float16, device=device)
        self._decoder, self._vocabulary = decoder, vocabulary

    @property
    def loss(self) -> float:
        """The weighted sum over the guesses so far."""
        return sum(self.losses)

    @property
    def is_forwarded(self) -> bool:
        """Whether the head can learn from it."""
        return self.num_forwarded == self.num_rows

    def take(self, states: Sequence[Tensor]) -> None:
        """The next rows' hidden states [W, H] after each of the layers, the last layer's before the final norm."""
        start, end = self.num_forwarded, self.num_forwarded + len(states[-1])
        self.features_TF[start:end] = torch.cat(list(states), dim=1).to(torch.bfloat16)
        weighted = [row for row in range(start, end) if self.item.weights[row + 1]]
        for first in range(0, len(weighted), MAX_LOGIT_ROWS):
            rows = weighted[first : first + MAX_LOGIT_ROWS]
            rows_R = torch.tensor(rows, device=self.features_TF.device)
            logits_RV = self._decoder.logits(states[-1][rows_R - start]).float()
            self._favourites_T[rows_R] = self._vocabulary.places[logits_RV.argmax(-1)]
            top_Rk, probs_Rk = liked(logits_RV[:, self._vocabulary.tokens_V], logits_RV.logsumexp(-1))
            self._top_Tk[rows_R], self._probs_Tk[rows_R] = top_Rk, probs_Rk
        self.num_forwarded = end

    def truth(self, rows_R: Tensor) -> Truth:
        """What the target says behind these rows; those behind the last one count as the last, which have no weight."""
        at_R = rows_R.clamp(max=self.num_rows - 1)
        return Truth(self._favourites_T[at_R], self._top_Tk[at_R].long(), self._probs_Tk[at_R].float())
