"""What requests do to logits: equal to transformers' processors and to the formulas by hand, also inside the engine."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from common.messages import InferenceRequest, Sampling
from services.executor.logits import processor_of
from services.executor.sampling import Draws, NonFiniteLogitsError, target_probabilities, uniform
from tests.drafts import junk_draft, oracle_draft
from tests.helpers import assert_matches
from tests.tiny import NUM_TOKENS, PROMPTS, serve, tiny_engine, tiny_pair, tiny_request

V = 97
PENALISED = Sampling(repetition_penalty=1.7, presence_penalty=0.9, frequency_penalty=0.4, logit_bias=((3, 4.0), (8, -9.5)))
SAMPLED = msgspec.structs.replace(PENALISED, temperature=0.9, min_p=0.02, top_k=40, top_p=0.97, seed=11)


def random_logits(seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(V, generator=torch.Generator().manual_seed(seed))


def changed(logits_V: Tensor, sampling: Sampling, prompt: list[int], output: list[int], stops: tuple[int, ...] = ()) -> Tensor:
    process = processor_of(sampling, prompt, stops, logits_V.numel())
    assert process is not None
    return process.apply(logits_V, output)


def by_hand(logits_V: Tensor, sampling: Sampling, prompt: list[int], output: list[int], stops: tuple[int, ...]) -> list[float]:
    """Token by token, as the formulas are written."""
    counts, bias, found = Counter(output), dict(sampling.logit_bias), []
    for token, logit in enumerate(logits_V.double().tolist()):
        value = -math.inf if token in stops and len(output) < sampling.min_tokens else logit
        value += bias.get(token, 0.0)
        if token in prompt or token in output:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        found.append(value - counts[token] * sampling.frequency_penalty - (counts[token] > 0) * sampling.presence_penalty)
    return found


def oracle_next(model: Any, sampling: Sampling, prompt: list[int], output: list[int], stops: tuple[int, ...]) -> int:
    """The next token by transformers' logits, the formulas by hand and a plain inverse of the distribution."""
    with torch.inference_mode():
        logits_V = model(torch.tensor([prompt + output])).logits[0, -1]
    values_V = torch.tensor(by_hand(logits_V, sampling, prompt, output, stops), dtype=torch.float64)
    if sampling.temperature == 0:
        return int(values_V.argmax())
    probs_V = target_probabilities(values_V, sampling)
    u = uniform(sampling.seed, len(prompt) + len(output))
    return int((torch.cumsum(probs_V, 0) <= u * float(probs_V.sum())).sum())


def test_plain_sampling_needs_no_processor() -> None:
    assert processor_of(Sampling(temperature=1.0, top_p=0.5, min_p=0.3), (1, 2), (3,), V) is None


@pytest.mark.parametrize("seed", range(4))
def test_all_changes_together_equal_the_formulas(seed: int) -> None:
    rng = random.Random(seed)
    prompt, output = rng.choices(range(V), k=30), rng.choices(range(20), k=25)
    sampling = msgspec.structs.replace(PENALISED, min_tokens=26, repetition_penalty=rng.choice([0.6, 1.3]))
    actual = changed(random_logits(seed), sampling, prompt, output, (2, 96, 1000))
    assert_matches(actual, torch.tensor(by_hand(random_logits(seed), sampling, prompt, output, (2, 96)), dtype=torch.float64))


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_equals_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = random.Random(5)
    prompt, output = rng.choices(range(V), k=20), rng.choices(range(V), k=20)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), random_logits(1).double()[None])[0]
    assert_matches(changed(random_logits(1), Sampling(repetition_penalty=penalty), prompt, output), expected)


def test_truncation_equals_transformers_warpers() -> None:
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed, (temperature, min_p, top_k, top_p) in enumerate(
        itertools.product((0.7, 1.5), (0.01, 0.2), (0, 5, 50), (0.5, 0.9, 1.0))
    ):
        warpers: Any = [TemperatureLogitsWarper(temperature), MinPLogitsWarper(min_p)]
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        logits_V = random_logits(seed)
        no_tokens: Any = torch.zeros(1, 1, dtype=torch.int64)
        expected = LogitsProcessorList(warpers)(no_tokens, logits_V[None].double())[0].softmax(0)
        sampling = Sampling(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
        assert_matches(target_probabilities(logits_V, sampling), expected)


def test_min_tokens_hold_back_ends_until_they_are_there() -> None:
    logits_V = torch.zeros(V)
    logits_V[7] = 20.0
    for num_output, is_possible in ((0, False), (2, False), (3, True)):
        values_V = changed(logits_V, Sampling(min_tokens=3), [1], [5] * num_output, (7,))
        assert (values_V.isfinite().sum() == V) == is_possible
        assert (values_V.argmax() == 7) == is_possible
    only_the_end_V = torch.full((V,), -math.inf).index_fill(0, torch.tensor([7]), 1.0)
    assert changed(only_the_end_V, Sampling(min_tokens=3), [1], [], (7,)).argmax() == 7, "a constraint left nothing else"


@pytest.mark.parametrize("sampling", [Sampling(repetition_penalty=1e-310), Sampling(repetition_penalty=1e308, temperature=1.0)])
def test_extreme_penalties_draw_a_token_or_name_the_row(sampling: Sampling) -> None:
    logits_V = random_logits(2)
    process = processor_of(sampling, tuple(range(V - 1)), (), V)
    assert process is not None
    token = Draws(logits_V[None]).token(0, sampling, 1, lambda row_V: process.apply(row_V, [1, 2]))
    assert 0 <= token < V
    with pytest.raises(NonFiniteLogitsError, match="row 0"):
        Draws(logits_V[None]).token(0, sampling, 1, lambda row_V: torch.full_like(row_V, -math.inf))


# --- in the engine -------------------------------------------------------------------------------------------------------

MIXED = [
    Sampling(),
    PENALISED,
    SAMPLED,
    Sampling(min_tokens=9),
    Sampling(temperature=1.2, frequency_penalty=1.5, min_p=0.05, seed=5),
    Sampling(repetition_penalty=0.8, temperature=0.6, seed=6),
]


def mixed_requests() -> list[InferenceRequest]:
    """Each of PROMPTS with other parameters; half of the vocabulary ends a request, of r3 after nine tokens."""
    stops = {"r3": tuple(range(0, V, 2))}
    return [
        tiny_request(name, prompt, NUM_TOKENS, sampling=sampling, stop_token_ids=stops.get(name, ()))
        for (name, prompt), sampling in zip(PROMPTS.items(), MIXED, strict=True)
    ]


def expected_output(request: InferenceRequest) -> list[int]:
    model, stops = tiny_pair()[0], request.stop_token_ids
    output: list[int] = []
    while len(output) < NUM_TOKENS and not (output and output[-1] in stops):
        output.append(oracle_next(model, request.sampling, list(request.prompt_tokens), output, stops))
    return output


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    return {request.request_id: expected_output(request) for request in mixed_requests()}


def test_the_oracle_uses_what_is_tested(expected: dict[str, list[int]]) -> None:
    assert 9 <= len(expected["r3"]) < NUM_TOKENS
    assert 3 in expected["r1"], "a bias of 4"


def test_alone_in_a_batch_and_under_speculation_the_tokens_are_the_oracles(expected: dict[str, list[int]]) -> None:
    decoder = tiny_pair()[1]
    assert serve(decoder, *mixed_requests()).streams.tokens == expected
    for draft in (junk_draft(1), oracle_draft(expected, 2), oracle_draft(expected, 3)):
        drafted = serve(decoder, *mixed_requests(), draft=draft)
        assert drafted.streams.tokens == expected
    assert drafted.engine.counters["accepted_tokens"] > 20
    for request in mixed_requests()[1:3]:
        assert serve(decoder, request).streams.tokens[request.request_id] == expected[request.request_id]


@pytest.mark.parametrize("num_generated", [1, 7])
def test_a_request_that_moved_goes_on_the_same(expected: dict[str, list[int]], num_generated: int) -> None:
    moved = [
        msgspec.structs.replace(
            request,
            prompt_tokens=request.prompt_tokens + tuple(expected[request.request_id][:num_generated]),
            num_generated=num_generated,
        )
        for request in mixed_requests()
    ]
    rest = {name: tokens[num_generated:] for name, tokens in expected.items()}
    assert serve(tiny_pair()[1], *moved).streams.tokens == rest
    assert serve(tiny_pair()[1], *moved, draft=oracle_draft(expected, 4)).streams.tokens == rest


def test_preemption_changes_nothing(expected: dict[str, list[int]]) -> None:
    engine = tiny_engine(tiny_pair()[1], num_pages=20)
    assert serve(tiny_pair()[1], *mixed_requests(), engine=engine).streams.tokens == expected
    assert engine.counters["preemptions"] > 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"min_p": float("nan")}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"logit_bias": ((V, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias"),
        ({"logit_bias": ((1, 1.0),) * 1025}, "logit_bias"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
    ],
)
def test_wrong_parameters_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    refusal = tiny_engine(tiny_pair()[1]).submit(tiny_request("bad", (5, 6), 4, sampling=Sampling(**fields)), None)
    assert refusal is not None
    assert refusal.reason == "invalid"
    assert named in refusal.message


def test_draws_after_penalties_have_the_target_distribution() -> None:
    """Through the engine: one token each of many requests, against the formulas."""
    from tests.test_executor_sampling import chi_square

    sampling = msgspec.structs.replace(SAMPLED, top_k=4, temperature=1.5)
    prompt, output = (5, 9, 9, 31), (7, 7, 3)
    requests = [
        tiny_request(f"s{seed}", prompt + output, 4, sampling=msgspec.structs.replace(sampling, seed=seed), num_generated=3)
        for seed in range(600)
    ]
    engine = tiny_engine(tiny_pair()[1], num_pages=4096, max_sequences=2000)
    streams = serve(tiny_pair()[1], *requests, engine=engine).streams
    drawn = Counter(tuple(tokens) for tokens in streams.tokens.values())
    with torch.inference_mode():
        logits_V = tiny_pair()[0](torch.tensor([[*prompt, *output]])).logits[0, -1]
    values = torch.tensor(by_hand(logits_V, sampling, list(prompt), list(output), ()), dtype=torch.float64)
    probs = {(token,): prob for token, prob in enumerate(target_probabilities(values, sampling).tolist())}
    assert chi_square(drawn, {token: prob for token, prob in probs.items() if prob > 0}) < 1
