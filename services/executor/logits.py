"""What a request asks to be done to logits before a token is drawn. Knows token ids and one row, not trees, rows or chances."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.messages import Sampling


class LogitsProcessor:
    """min_tokens, logit_bias, then the repetition, frequency and presence penalties: vLLM's order and formulas.

    The repetition penalty (Keskar et al. 2019, section 4.1) sees prompt and output, OpenAI's other two the output only.
    """

    def __init__(self, sampling: Sampling, prompt: Seq[int], stop_ids: Collection[int], vocab_size: int) -> None:
        self._sampling = sampling
        self._prompt = torch.tensor(sorted(set(prompt)) if sampling.repetition_penalty != 1.0 else [], dtype=torch.int64)
        self._stops = torch.tensor([token for token in stop_ids if 0 <= token < vocab_size], dtype=torch.int64)
        self._biased = torch.tensor([token for token, _ in sampling.logit_bias], dtype=torch.int64)
        self._bias = torch.tensor([bias for _, bias in sampling.logit_bias], dtype=torch.float64)

    def apply(self, logits_V: Tensor, output: Seq[int]) -> Tensor:
        """The logits [V] (float64, a copy on the CPU) of the token that follows this output; none of them is +inf."""
        sampling = self._sampling
        changed_V = logits_V.to("cpu", torch.float64, copy=True)
        if len(output) < sampling.min_tokens:
            going_on_V = changed_V.index_fill(0, self._stops, -torch.inf)
            if bool(torch.isfinite(going_on_V.max())):  # else a constraint is met, and nothing but the end can follow
                changed_V = going_on_V
        changed_V.index_add_(0, self._biased, self._bias)
        found, counts = (torch.from_numpy(each) for each in np.unique(np.array(output, dtype=np.int64), return_counts=True))
        if sampling.repetition_penalty != 1.0:
            seen, factor = torch.cat((self._prompt, found)), sampling.repetition_penalty
            old = changed_V[seen]  # a token of both is there twice, but written with the same value
            changed_V[seen] = torch.where(old > 0, old / factor, old * factor)
        changed_V[found] -= sampling.frequency_penalty * counts.double() + sampling.presence_penalty
        return changed_V.clamp_(max=torch.finfo(torch.float64).max)


def restricted(logits_V: Tensor, allowed_V: NDArray[np.bool_]) -> Tensor:
    """The logits of allowed tokens, minus infinity elsewhere: what is drawn from them is the target's, renormalised."""
    return logits_V.masked_fill(torch.from_numpy(~allowed_V).to(logits_V.device), -torch.inf)


def processor_of(sampling: Sampling, prompt: Seq[int], stop_ids: Collection[int], vocab_size: int) -> LogitsProcessor | None:
    """The request's processor; None if it changes no logits."""
    penalties = (sampling.repetition_penalty - 1.0, sampling.frequency_penalty, sampling.presence_penalty)
    if not any(penalties) and not sampling.logit_bias and not sampling.min_tokens:
        return None
    return LogitsProcessor(sampling, prompt, stop_ids, vocab_size)
