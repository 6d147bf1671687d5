"""Log probabilities: equal to transformers' log_softmax, for output and prompt, whatever else runs, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from common.codec import encode
from common.messages import InferenceRequest, Logprobs, Sampling, TokenChunk
from services.executor.logprobs import BLOCK_ROWS, LOWEST, score, score_blocks
from services.executor.sampling import NonFiniteLogitsError
from services.executor.scheduler import IterationPlan
from services.executor.sharing import plan_turn
from services.executor.views import Limits
from tests.drafts import oracle_draft
from tests.tiny import (
    NUM_TOKENS,
    PROMPTS,
    Driver,
    all_requests,
    random_prompt,
    serve,
    tiny_engine,
    tiny_pair,
    tiny_request,
    truth,
)

SAMPLED = Sampling(temperature=1.3, repetition_penalty=1.5, top_k=9, logit_bias=((4, 5.0),), seed=3)


def log_softmax(tokens: Sequence[int]) -> Tensor:
    """transformers' log probabilities [L, V] of what follows each token, in fp32."""
    with torch.inference_mode():
        logits: Tensor = tiny_pair()[0](torch.tensor([list(tokens)])).logits[0]
    return logits.float().log_softmax(-1)


def joined(parts: Sequence[Logprobs]) -> Logprobs:
    assert len({part.num_top for part in parts}) == 1
    return Logprobs(
        num_top=parts[0].num_top,
        chosen=tuple(x for part in parts for x in part.chosen),
        top_tokens=tuple(x for part in parts for x in part.top_tokens),
        top_logprobs=tuple(x for part in parts for x in part.top_logprobs),
    )


def assert_log_softmax(actual: Logprobs, rows_RV: Tensor, tokens: Sequence[int], num_top: int) -> None:
    """They are of these tokens and of the most probable ones of these rows."""
    assert (len(actual.chosen), actual.num_top) == (len(tokens), num_top)
    chosen = rows_RV[range(len(tokens)), list(tokens)]
    torch.testing.assert_close(torch.tensor(actual.chosen), chosen, rtol=1e-4, atol=1e-4)
    top = rows_RV.topk(num_top).values
    torch.testing.assert_close(torch.tensor(actual.top_logprobs).view(len(tokens), num_top), top, rtol=1e-4, atol=1e-4)
    told = rows_RV.gather(1, torch.tensor(actual.top_tokens, dtype=torch.int64).view(len(tokens), num_top))
    torch.testing.assert_close(told, top, rtol=1e-4, atol=1e-4)


def output_logprobs(chunks: Sequence[TokenChunk], name: str) -> Logprobs:
    mine = [chunk for chunk in chunks if chunk.request_id == name and chunk.tokens]
    assert all(chunk.logprobs is not None and len(chunk.logprobs.chosen) == len(chunk.tokens) for chunk in mine)
    return joined([chunk.logprobs for chunk in mine if chunk.logprobs])


def prompt_logprobs(chunks: Sequence[TokenChunk], name: str) -> Logprobs:
    mine = [chunk for chunk in chunks if chunk.request_id == name]
    parts = [chunk.prompt_logprobs for chunk in mine if chunk.prompt_logprobs]
    assert [chunk.prompt_logprobs is not None for chunk in mine] == [True] * len(parts) + [False] * (len(mine) - len(parts))
    return joined(parts)


def chunks_of(driver: Driver) -> list[TokenChunk]:
    return [chunk for iteration in driver.iterations for chunk in iteration.chunks]


def asking(**fields: object) -> list[InferenceRequest]:
    """Half of the requests sample with everything, each asks for another number of alternatives."""
    return [
        msgspec.structs.replace(request, **{"logprobs": number, "sampling": SAMPLED if number % 2 else Sampling()} | fields)
        for number, request in enumerate(all_requests())
    ]


@pytest.mark.parametrize("is_drafted", [False, True])
def test_output_logprobs_are_of_the_raw_distribution(is_drafted: bool) -> None:
    driver = serve(tiny_pair()[1], *asking(), draft=oracle_draft(truth(), 1) if is_drafted else None)
    assert (driver.engine.counters["accepted_tokens"] > 20) == is_drafted
    for number, request in enumerate(asking()):
        output = driver.streams.tokens[request.request_id]
        rows_LV = log_softmax(request.prompt_tokens + tuple(output))[len(request.prompt_tokens) - 1 : -1]
        assert_log_softmax(output_logprobs(chunks_of(driver), request.request_id), rows_LV, output, number)


def test_nobody_else_gets_any() -> None:
    driver = serve(tiny_pair()[1], *all_requests())
    assert all(chunk.logprobs is None and chunk.prompt_logprobs is None for chunk in chunks_of(driver))


@pytest.mark.parametrize("max_batch_tokens", [5, 1024])
def test_prompt_logprobs_however_the_prompt_is_cut(max_batch_tokens: int) -> None:
    engine = tiny_engine(tiny_pair()[1], limits=Limits(max_batch_tokens=max_batch_tokens, min_prefill_tokens=3))
    driver = serve(tiny_pair()[1], *asking(prompt_logprobs=3), engine=engine)
    for name, prompt in PROMPTS.items():
        if len(prompt) > 1:
            assert_log_softmax(prompt_logprobs(chunks_of(driver), name), log_softmax(prompt)[:-1], prompt[1:], 3)
    assert not any(chunk.prompt_logprobs for chunk in chunks_of(driver) if chunk.request_id == "r0"), "one token has none"


def test_prompt_logprobs_come_once_under_preemption() -> None:
    requests = asking(prompt_logprobs=1)
    engine = tiny_engine(tiny_pair()[1], num_pages=20, limits=Limits(max_batch_tokens=9, min_prefill_tokens=4))
    driver = serve(tiny_pair()[1], *requests, engine=engine)
    assert engine.counters["preemptions"] > 0
    for request in requests[1:]:
        prompt, output = request.prompt_tokens, driver.streams.tokens[request.request_id]
        assert_log_softmax(prompt_logprobs(chunks_of(driver), request.request_id), log_softmax(prompt)[:-1], prompt[1:], 1)
        assert len(output_logprobs(chunks_of(driver), request.request_id).chosen) == len(output) == NUM_TOKENS


@pytest.mark.parametrize("pages", [96, 20])
def test_a_plan_knows_the_rows_that_are_scored(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and no more unless pages were short, or a sequence that lost its pages computes rows again."""
    plans: list[IterationPlan] = []

    def planned(*arguments: Any) -> Any:
        result = plan_turn(*arguments)
        plans.append(result[0])
        return result

    monkeypatch.setattr("services.executor.engine.plan_turn", planned)
    requests = [msgspec.structs.replace(each, prompt_logprobs=(None, 1)[i % 2]) for i, each in enumerate(all_requests())]
    engine = tiny_engine(tiny_pair()[1], num_pages=pages, limits=Limits(max_batch_tokens=9, min_prefill_tokens=4))
    driver = serve(tiny_pair()[1], *requests, engine=engine)
    told = [sum(len(c.prompt_logprobs.chosen) for c in i.chunks if c.prompt_logprobs) for i in driver.iterations]
    assert sum(told) == sum(len(each.prompt_tokens) - 1 for each in requests[1::2])
    for plan, num_told in zip(plans, told, strict=True):
        assert num_told <= plan.rows.scored
        assert num_told == plan.rows.scored or engine.counters["preemptions"]


def test_output_of_an_earlier_executor_is_no_prompt() -> None:
    prompt, moved = PROMPTS["r4"], truth()["r4"][:4]
    request = tiny_request("r4", (*prompt, *moved), NUM_TOKENS, num_generated=4, logprobs=2, prompt_logprobs=0)
    driver = serve(tiny_pair()[1], request)
    assert_log_softmax(prompt_logprobs(chunks_of(driver), "r4"), log_softmax(prompt)[:-1], prompt[1:], 0)
    rows_LV = log_softmax((*prompt, *truth()["r4"]))[len(prompt) + 3 : -1]
    assert_log_softmax(output_logprobs(chunks_of(driver), "r4"), rows_LV, truth()["r4"][4:], 2)


def test_long_prompts_are_scored_and_sent_by_blocks() -> None:
    largest: list[int] = []

    def logits(hidden_RH: Tensor) -> Tensor:
        largest.append(len(hidden_RH))
        return hidden_RH * 2

    hidden_RH = torch.randn(8191, 64, generator=torch.Generator().manual_seed(0))
    tokens = random_prompt(8191, vocab_size=64)
    parts = list(score_blocks(logits, hidden_RH, tokens, 20))
    assert max(largest) <= BLOCK_ROWS
    assert_log_softmax(joined(parts), (hidden_RH * 2).log_softmax(-1), tokens, 20)
    sizes = [len(encode(TokenChunk(request_id="r" * 32, seq=10**6, prompt_logprobs=part))) for part in parts]
    assert max(sizes) < 100_000, "also on a server with NATS' default of 1 MiB"


def test_impossible_tokens_have_a_finite_number_and_broken_rows_an_error() -> None:
    scores = score(torch.tensor([[0.0, -math.inf, 1.0]]), [1], 3)
    assert scores.chosen == (LOWEST,)
    assert scores.top_tokens == (2, 0, 1)
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteLogitsError):
            score(torch.tensor([[0.0, bad, 1.0]]), [0], 1)


def test_a_prompt_that_cannot_be_scored_ends_its_own_request_only() -> None:
    engine = tiny_engine(tiny_pair()[1], limits=Limits(max_batch_tokens=8, min_prefill_tokens=4))
    for name in ("r5", "r3"):
        engine.submit(tiny_request(name, PROMPTS[name], NUM_TOKENS, prompt_logprobs=1), None)
    driver = Driver(engine)
    driver.step()
    engine.cache.v[0][engine.sequences["r5"].table.slots(0, 1)[0]] = float("nan")
    driver.run()
    assert driver.streams.reason("r5") == "error"
    assert driver.streams.tokens == {"r3": truth()["r3"], "r5": []}
    assert engine.pages.num_free == engine.pages.num_pages


@pytest.mark.parametrize("fields", [{"logprobs": -1}, {"logprobs": 21}, {"prompt_logprobs": 21}, {"prompt_logprobs": -1}])
def test_too_many_alternatives_are_refused_by_name(fields: dict[str, Any]) -> None:
    refusal = tiny_engine(tiny_pair()[1]).submit(tiny_request("bad", (5, 6), 4, **fields), None)
    assert refusal is not None
    assert refusal.reason == "invalid"
    assert refusal.message.startswith(next(iter(fields)))
