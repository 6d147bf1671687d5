"""Sampling: a function of (seed, position), and of the target's distribution exactly."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from common.messages import Sampling
from services.executor import sampling
from services.executor.sampling import Draws, target_probabilities, uniform

NUM_DRAWS = 20_000
Prefix = tuple[int, ...]


def draw_tokens(logits_RV: Tensor, samplings: Sequence[Sampling], positions: Iterable[int]) -> list[int]:
    """One token per row."""
    if len(samplings) == 0:
        return []
    draws, places = Draws(logits_RV), list(positions)
    draws.draw_ahead(zip(range(len(places)), samplings, places, strict=True))
    return [draws.token(row, samplings[row], position) for row, position in enumerate(places)]


def chi_square(counts: Mapping[Prefix, int], expected: Mapping[Prefix, float]) -> float:
    """Pearson's statistic over its critical value at a level of 1e-4 (Wilson and Hilferty): above 1 the fit is refuted."""
    total = sum(counts.values())
    possible = {outcome: prob * total for outcome, prob in expected.items() if prob > 0}
    assert set(counts) <= set(possible), "an impossible outcome was drawn"
    assert min(possible.values()) >= 5, "too few draws for this outcome"
    statistic = sum((counts.get(outcome, 0) - mean) ** 2 / mean for outcome, mean in possible.items())
    spread = 2 / (9 * (len(possible) - 1))
    return statistic / ((len(possible) - 1) * (1 - spread + 3.719 * math.sqrt(spread)) ** 3)


def draw(logits_V: Tensor, parameters: Sampling, position: int = 0) -> int:
    return draw_tokens(logits_V[None], [parameters], [position])[0]


def test_uniform_numbers_are_a_function_of_seed_and_position() -> None:
    assert uniform(3, 4) == uniform(3, 4)
    numbers = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(numbers)) == 1600
    assert all(0 <= number < 1 for number in numbers)
    assert np.histogram(numbers, bins=8, range=(0, 1))[0].min() > 150
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    grid = np.array([[uniform(seed, position) for position in range(60)] for seed in range(60)])
    for one, other in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / math.sqrt(one.size)


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits_RV = torch.randn(12, 50, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(temperature=0.5 * (i % 3), top_p=0.9, top_k=i, seed=i) for i in range(12)]
    alone = [draw(logits_RV[i], samplings[i], i) for i in range(12)]
    assert draw_tokens(logits_RV, samplings, range(12)) == alone
    order = random.Random(0).sample(range(12), 12)
    assert draw_tokens(logits_RV[order], [samplings[i] for i in order], order) == [alone[i] for i in order]
    assert draw_tokens(logits_RV[:0], [], []) == []


def test_other_seeds_and_positions_draw_other_tokens() -> None:
    logits_V = torch.zeros(1000)
    assert len({draw(logits_V, Sampling(temperature=1.0, seed=seed), 7) for seed in range(100)}) > 80
    assert len({draw(logits_V, Sampling(temperature=1.0, seed=7), position) for position in range(100)}) > 80


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-8, 1e-320])
def test_no_temperature_and_hardly_any_are_greedy(temperature: float) -> None:
    logits_V = torch.tensor([1.0, 30.0, 29.0, -40.0])
    assert {draw(logits_V, Sampling(temperature=temperature, seed=seed)) for seed in range(50)} == {1}


@pytest.mark.parametrize(("u", "expected"), [(0.0, 1), (0.499, 1), (0.501, 3), (1.0 - 2**-53, 3)])
def test_words_without_probability_are_never_drawn(monkeypatch: pytest.MonkeyPatch, u: float, expected: int) -> None:
    """Not even by the first and the last of the random numbers."""
    monkeypatch.setattr(sampling, "uniform", lambda seed, position: u)
    assert draw(torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]), Sampling(temperature=1.0)) == expected


def test_an_infinite_temperature_is_uniform() -> None:
    probs = target_probabilities(torch.tensor([1.0, 30.0, 29.0, -40.0]), Sampling(temperature=math.inf))
    assert probs.tolist() == [0.25] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_raise(bad: float, temperature: float) -> None:
    logits_RV = torch.zeros(3, 5)
    logits_RV[2, 4] = bad
    with pytest.raises(FloatingPointError, match="row 2"):
        draw_tokens(logits_RV, [Sampling(temperature=temperature)] * 3, [1, 2, 3])


def test_a_row_without_any_possible_token_raises() -> None:
    with pytest.raises(FloatingPointError, match="row 0"):
        draw_tokens(torch.full((1, 5), -math.inf), [Sampling()], [0])


def test_target_probabilities_by_hand() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    plain = target_probabilities(logits_V, Sampling(temperature=1.0))
    torch.testing.assert_close(plain, torch.tensor([0.1, 0.4, 0.3, 0.2]).double())
    cooled = target_probabilities(logits_V, Sampling(temperature=0.5))
    torch.testing.assert_close(cooled, torch.tensor([0.01, 0.16, 0.09, 0.04]).double() / 0.3)
    two = target_probabilities(logits_V, Sampling(temperature=1.0, top_k=2))
    torch.testing.assert_close(two, torch.tensor([0, 0.4, 0.3, 0]).double() / 0.7)
    # 0.4 + 0.3 = 0.7 of all, but 1.0 of the two that top_k leaves: top_p comes second, and cuts what it is left with
    for top_p, kept in ((0.39, [1]), (0.6, [1, 2]), (0.71, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        probs = target_probabilities(logits_V, Sampling(temperature=1.0, top_p=top_p))
        assert torch.nonzero(probs).flatten().tolist() == kept
        torch.testing.assert_close(probs.sum().item(), 1.0)
    half = torch.tensor([0.25, 0.5, 0.25]).log()
    assert target_probabilities(half, Sampling(temperature=1.0, top_p=0.5)).tolist() == [0, 1, 0], "half is enough"
    both = target_probabilities(logits_V, Sampling(temperature=1.0, top_k=2, top_p=0.55))
    assert torch.nonzero(both).flatten().tolist() == [1]
    assert target_probabilities(logits_V, Sampling(temperature=1.0, top_p=0.0)).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "parameters", [Sampling(temperature=0.7), Sampling(temperature=1.3, top_k=5), Sampling(temperature=1.0, top_p=0.8, top_k=7)]
)
def test_draws_have_the_target_distribution(parameters: Sampling) -> None:
    logits_V = torch.randn(8, generator=torch.Generator().manual_seed(4))
    expected: dict[Prefix, float] = {(i,): float(p) for i, p in enumerate(target_probabilities(logits_V, parameters))}
    samplings = [msgspec.structs.replace(parameters, seed=seed) for seed in range(NUM_DRAWS)]
    drawn: list[Prefix] = [(word,) for word in draw_tokens(logits_V.expand(NUM_DRAWS, 8), samplings, [3] * NUM_DRAWS)]
    assert chi_square(Counter(drawn), expected) < 1
    greedy = max(expected, key=lambda word: expected[word])
    biased = Counter(greedy if i % 20 == 0 else word for i, word in enumerate(drawn))
    assert chi_square(biased, expected) > 1, "a bias of one in twenty would not be seen"
