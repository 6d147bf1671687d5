"""Logits that are not finite: the request that has them ends with an error, and nobody else notices."""

from __future__ import annotations

import pytest
import torch

from common.messages import LoraSpec, Sampling
from services.executor.model import Decoder
from tests.helpers import random_adapter
from tests.tiny import PROMPTS, Driver, all_requests, serve, tiny_engine, tiny_pair, tiny_request, truth


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_whose_logits_are_not_finite_ends_alone(temperature: float) -> None:
    """Its adapter makes NaN of every row; then the same pages serve others."""
    decoder = tiny_pair()[1]
    engine = tiny_engine(decoder, num_pages=60)
    adapter = random_adapter(decoder, LoraSpec(rank=2, alpha=4.0))
    adapter.weights.flat.fill_(torch.nan)
    engine.adapters["bad"] = adapter
    sick = tiny_request("sick", PROMPTS["r4"], 5, sampling=Sampling(temperature=temperature))
    driver = serve(decoder, sick, *all_requests(), adapters={"sick": "bad"}, engine=engine)
    end = driver.streams.ends["sick"]
    assert (end.finish_reason, end.tokens) == ("error", ())
    assert "finite" in (end.error or "")
    healthy = {name: tokens for name, tokens in driver.streams.tokens.items() if name != "sick"}
    assert healthy == truth()
    assert dict(serve(decoder, *all_requests(), engine=engine).streams.tokens) == truth()
    assert engine.counters["finished_error"] == 1


def test_a_model_whose_logits_are_not_finite_answers_every_request_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_pair()[1]
    logits = decoder.logits

    def infinite(self: Decoder, hidden_RH: torch.Tensor) -> torch.Tensor:
        return logits(hidden_RH) * torch.inf

    monkeypatch.setattr(Decoder, "logits", infinite)
    engine = tiny_engine(decoder)
    driver: Driver = serve(decoder, *all_requests(), engine=engine)
    assert {end.finish_reason for end in driver.streams.ends.values()} == {"error"}
    assert len(driver.streams.ends) == len(PROMPTS)
    assert engine.pages.num_free == engine.pages.num_pages
