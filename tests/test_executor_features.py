"""The hidden states that an executor sends to a planner whose drafter wants them are those of the committed tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from common.messages import OpenedSequence, PlannerGranted
from services.executor.engine import Engine, Iteration
from services.executor.features import MAX_REPORT_BYTES, FeatureWindow, FeatureWish, bounded, wish_of
from services.executor.views import Limits
from tests.drafts import oracle_draft
from tests.tiny import (
    NUM_TOKENS,
    PROMPTS,
    SHAPE,
    Driver,
    all_requests,
    random_prompt,
    tiny_engine,
    tiny_pair,
    tiny_request,
    truth,
)

LAYERS = (1, 2)
WIDTH = SHAPE["hidden_size"] * len(LAYERS)


def expected_states(tokens: Sequence[int]) -> torch.Tensor:
    """Rows [T, F] of transformers' model, the last layer's before the final norm."""
    model, _ = tiny_pair()
    kept: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0]))
    with torch.inference_mode():
        states = model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
    hook.remove()
    return torch.cat([states[1][0], kept[0]], dim=1)


def rows(features: bytes) -> torch.Tensor:
    if not features:
        return torch.empty(0, WIDTH)
    return torch.frombuffer(bytearray(features), dtype=torch.bfloat16).float().view(-1, WIDTH)


class Listener:
    """Keeps what a planner would: tokens and rows of each sequence."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.rows: dict[str, torch.Tensor] = {}

    def take(self, iteration: Iteration) -> None:
        for step in iteration.progress:
            self.tokens[step.request_id] += step.tokens
            self.rows[step.request_id] = torch.cat([self.rows[step.request_id], rows(step.features)])
        for opened in iteration.opened:
            self.tokens[opened.request_id] = list(opened.tokens)
            self.rows[opened.request_id] = rows(opened.features)

    def check(self, name: str, least: int) -> None:
        """The rows are those of the tokens that end with the last but one."""
        tokens, got = self.tokens[name], self.rows[name]
        assert len(got) >= least
        wanted = expected_states(tokens)[len(tokens) - 1 - len(got) : len(tokens) - 1]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=2**-7)


def listen(engine: Engine, driver: Driver) -> Listener:
    listener = Listener()
    while engine.has_work:
        listener.take(driver.step())
    return listener


@pytest.mark.parametrize("window", [3, 64])
@pytest.mark.parametrize("max_batch_tokens", [9, 1024], ids=["chunks", "whole"])
def test_rows_of_the_accepted_path_and_of_the_prompts_end(window: int, max_batch_tokens: int) -> None:
    engine = tiny_engine(tiny_pair()[1], limits=Limits(max_batch_tokens=max_batch_tokens, min_prefill_tokens=4))
    engine.feature_wish = FeatureWish(LAYERS, window)
    for request in all_requests():
        engine.submit(request, None)
    listener = listen(engine, Driver(engine, oracle_draft(truth())))
    assert engine.counters["accepted_tokens"] > 10
    for name, prompt in PROMPTS.items():
        assert listener.tokens[name][len(prompt) :] == truth()[name]
        listener.check(name, min(window, len(prompt)) + NUM_TOKENS - 1)


def test_a_cached_prompt_has_rows_of_what_was_computed_only() -> None:
    engine = tiny_engine(tiny_pair()[1])
    engine.feature_wish = FeatureWish(LAYERS, 64)
    driver = Driver(engine)
    for name in ("first", "second"):
        engine.submit(tiny_request(name, random_prompt(19), 4), None)
        listener = listen(engine, driver)
    assert len(listener.rows["second"]) == 19 % 4 + 3
    listener.check("second", 1)


def test_rows_survive_preemption() -> None:
    engine = tiny_engine(
        tiny_pair()[1], num_pages=18, limits=Limits(max_batch_tokens=11, min_prefill_tokens=4), prefix_cache=False
    )
    engine.feature_wish = FeatureWish(LAYERS, 64)
    for i in range(3):
        engine.submit(tiny_request(f"p{i}", random_prompt(24, i), 20, arrived_at=float(i)), None)
    listener = listen(engine, Driver(engine))
    assert engine.counters["preemptions"] > 0
    for i in range(3):
        listener.check(f"p{i}", 40)


def test_a_planner_that_comes_later_gets_rows_from_then_on() -> None:
    engine = tiny_engine(tiny_pair()[1])
    engine.submit(tiny_request("r", random_prompt(9), 12), None)
    driver, listener = Driver(engine), Listener()
    for _ in range(4):
        listener.take(driver.step())
    (sequence,) = engine.sequences.values()
    assert len(listener.rows["r"]) == 0
    engine.feature_wish = FeatureWish(LAYERS, 8)
    while engine.has_work:
        listener.take(driver.step())
    listener.check("r", 8)
    assert sequence.features is not None
    torch.testing.assert_close(rows(sequence.opened().features), listener.rows["r"][-8:])


def test_rows_after_a_gap_replace_the_older_ones() -> None:
    window = FeatureWindow(FeatureWish((1,), 4), 3, np.full((3, 1), 7, dtype=np.uint16))
    window.append(2, np.full((2, 1), 8, dtype=np.uint16))
    assert window.rows.ravel().tolist() == [7, 7, 7, 8]
    assert window.end == 4
    window.append(9, np.full((1, 1), 9, dtype=np.uint16))
    assert (window.rows.ravel().tolist(), window.end) == ([9], 10)
    assert window.before(10) == bytes([9, 0])
    assert window.before(11) == b""


@pytest.mark.parametrize("seed", range(4))
def test_a_window_holds_the_last_rows_whatever_comes(seed: int) -> None:
    source = random.Random(seed)
    window, kept, end = FeatureWindow(FeatureWish((1,), 5), 0, np.empty((0, 2), dtype=np.uint16)), list[int](), 0
    for _ in range(300):
        start, number = max(0, end + source.choice((-2, 0, 0, 0, 0, 3))), source.choice((0, 1, 1, 2, 7))
        window.append(start, np.array([[at, at] for at in range(start, start + number)], dtype=np.uint16).reshape(-1, 2))
        if start > end:
            kept, end = [], start
        kept, end = (kept + list(range(end, start + number)))[-5:], max(end, start + number)
        assert (window.rows[:, 1].tolist(), window.end) == (kept, end)
        assert window.before(end) == b"".join(2 * at.to_bytes(2, "little") for at in kept)


def test_wishes_that_the_model_cannot_grant_are_none() -> None:
    def wish(layers: tuple[int, ...], window: int = 8) -> FeatureWish:
        return wish_of(PlannerGranted(planner_id="p", feature_layers=layers, feature_window=window), num_layers=4)

    assert wish((1, 4)) == FeatureWish((1, 4), 8)
    for layers, window in [((0, 4), 8), ((4, 1), 8), ((2, 2), 8), ((5,), 8), ((1,), 0), ((1,), 1 << 20), ((), 8)]:
        assert wish(layers, window) == FeatureWish()


def test_a_report_that_opens_everything_stays_within_a_message() -> None:
    each = OpenedSequence(request_id="r", tokens=(1,), num_output=1, max_output=2, features=bytes(MAX_REPORT_BYTES // 2))
    assert [len(opened.features) > 0 for opened in bounded([each] * 4)] == [True, True, False, False]
