"""Log probabilities of tokens under the model's own distribution, in bounded memory. Knows rows and tokens, not requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from common.messages import Logprobs
from services.executor.sampling import NonFiniteLogitsError

BLOCK_ROWS = 128
"""Rows whose logits are in memory at once, and whose log probabilities go into one message: at most 40 KB."""
LOWEST = -9999.0
"""Stands for a probability of zero, as in vLLM: JSON has no infinity."""


def score(logits_RV: Tensor, tokens: Seq[int], num_top: int) -> Logprobs:
    """Of each row's token and of its `num_top` most probable ones; raw logits, before temperature and all else (vLLM's
    `raw_logprobs`). Raises NonFiniteLogitsError.
    """
    wide_RV = logits_RV.float()
    log_norm_R1 = torch.logsumexp(wide_RV, dim=-1, keepdim=True)
    if not bool(torch.isfinite(log_norm_R1).all()):
        raise NonFiniteLogitsError("logits are not finite")
    index_R1 = torch.tensor(tokens, dtype=torch.int64, device=wide_RV.device)[:, None]
    top_RK, top_tokens_RK = torch.topk(wide_RV, min(num_top, wide_RV.shape[1]), dim=-1)
    return Logprobs(
        chosen=_floats(wide_RV.gather(1, index_R1) - log_norm_R1),
        num_top=top_RK.shape[1],
        top_tokens=tuple(top_tokens_RK.flatten().tolist()),
        top_logprobs=_floats(top_RK - log_norm_R1),
    )


def score_blocks(logits: Callable[[Tensor], Tensor], hidden_RH: Tensor, tokens: Seq[int], num_top: int) -> Iterator[Logprobs]:
    """The same of hidden states, block by block: the logits of a long prompt would take gigabytes."""
    for start in range(0, len(tokens), BLOCK_ROWS):
        yield score(logits(hidden_RH[start : start + BLOCK_ROWS]), tokens[start : start + BLOCK_ROWS], num_top)


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.clamp(min=LOWEST).flatten().tolist())
