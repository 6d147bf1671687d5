"""Drawing tokens: the compiled way against the specification, and the specification's rows against each row alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kernels import ops, sampling
from kernels.native.build import library
from kernels.ops import Draw

VOCABULARY = 3000


def random_draw(rng: random.Random, row: int) -> Draw:
    return Draw(
        row=row,
        temperature=rng.choice((1e-3, 0.5, 1.0, 3.0)),
        top_k=rng.choice((0, 0, 1, 5, 2000, 10_000)),
        top_p=rng.choice((1.0, 1.0, 0.0, 0.3, 0.95, 0.9999)),
        min_p=rng.choice((0.0, 0.0, 0.02, 1.0)),
        uniform=rng.choice((0.0, rng.random(), rng.random(), rng.random(), 1 - 1e-16)),
    )


def logits(rng: random.Random, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Peaked and flat rows, with impossible tokens and, in bfloat16, many equal ones."""
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    values = torch.randn(num_rows, VOCABULARY, generator=generator)
    values *= torch.tensor([rng.choice((0.0, 0.1, 2.0, 30.0)) for _ in range(num_rows)])[:, None]
    values[torch.rand(values.shape, generator=generator) < 0.1] = -torch.inf
    return values.to(dtype)


@pytest.mark.skipif(library() is None, reason="no compiler, or no AVX2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_draws_are_the_specifications(dtype: torch.dtype) -> None:
    """They may part only on an edge that float32 rounds: between two tokens, or of what top_p keeps."""
    rng, num_edges, num_draws = random.Random(1), Counter[bool](), Counter[bool]()
    for _ in range(20):
        values = logits(rng, 4, dtype)
        draws = [random_draw(rng, rng.randrange(4)) for _ in range(12)]
        probs = sampling.target_probabilities(values, draws)
        for draw, found, expected, row in zip(
            draws, ops.draw_tokens(values, draws), sampling.draw_tokens(values, draws), probs, strict=True
        ):
            if found != expected:
                low, high = sorted((found, expected))
                assert int((row[low + 1 : high] > 0).sum()) <= 1, "neighbours among the tokens that may be drawn"
                num_edges[draw.top_p < 1.0] += 1
            num_draws[draw.top_p < 1.0] += 1
    assert num_edges[False] <= 0.01 * num_draws[False]
    assert num_edges[True] <= 0.1 * num_draws[True], "of thousands of equal tokens top_p may keep one more or less"


@pytest.mark.parametrize("draw_tokens", [sampling.draw_tokens, ops.draw_tokens])
def test_a_draw_does_not_depend_on_the_others(draw_tokens: Callable[[Tensor, Sequence[Draw]], list[int]]) -> None:
    rng = random.Random(2)
    values = logits(rng, 5, torch.float32)
    draws = [random_draw(rng, rng.randrange(5)) for _ in range(40)]
    assert draw_tokens(values, draws) == [draw_tokens(values, [draw])[0] for draw in draws]


@pytest.mark.parametrize("draw_tokens", [sampling.draw_tokens, ops.draw_tokens])
@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 1e-16])
def test_impossible_tokens_are_never_drawn(draw_tokens: Callable[[Tensor, Sequence[Draw]], list[int]], uniform: float) -> None:
    values = torch.full((1, 300), -torch.inf)
    values[0, 200] = 5.0
    draw = Draw(row=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=uniform)
    assert draw_tokens(values, [draw]) == [200]
