"""SmolLM2-135M-Instruct in fp32: sampled output keeps its constraint, and is the same with the planner's drafts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from common.chat import ChatTokenizer
from common.messages import Constraint, InferenceRequest, Sampling
from services.executor.grammar import Grammar, Vocabulary
from services.executor.loader import load_decoder
from services.executor.model import Decoder
from services.planner.actor import make_planner
from services.planner.config import PlannerConfig
from tests.helpers import CPU
from tests.test_lossless_real import PROFILE, run_with_planner
from tests.tiny import Driver, Streams, tiny_engine, tiny_request

pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.timeout(600)]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "color": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEX = r"(Mon|Tues|Wednes)day, [0-9]{1,2}:[0-9]{2} (am|pm)"
NUM_SAMPLES = 32
QUESTION = [{"role": "user", "content": "Describe a person in JSON with name, age and favourite color."}]
WHEN = [{"role": "user", "content": "When do we meet? Answer with day and time, like Monday, 9:30 am."}]


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    """A model of this size gains from them, tiny ones do not."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(real_model_dir: Path) -> ChatTokenizer:
    return ChatTokenizer.load(real_model_dir)


@pytest.fixture(scope="module")
def decoder(real_model_dir: Path) -> Decoder:
    return load_decoder(real_model_dir, torch.float32, CPU)


@pytest.fixture(scope="module")
def vocabulary(real_model_dir: Path, decoder: Decoder) -> Vocabulary:
    return Vocabulary.load(real_model_dir, decoder.config.vocab_size, decoder.config.eos_token_ids)


def requests(tokenizer: ChatTokenizer, num_samples: int) -> list[InferenceRequest]:
    """Many people in JSON, some greedy, and a few times of day."""
    schema = Constraint(kind="json_schema", text=json.dumps(SCHEMA))
    about, when = (tuple(tokenizer.encode(tokenizer.render(messages))) for messages in (QUESTION, WHEN))
    made = []
    for seed in range(num_samples):
        sampling = Sampling(temperature=1.0, seed=seed) if seed else Sampling()
        made.append(tiny_request(f"json{seed}", about, 48, sampling=sampling, constraint=schema))
    for seed in range(num_samples // 4):
        sampling = Sampling(temperature=1.0, top_p=0.9, seed=seed) if seed else Sampling()
        made.append(tiny_request(f"time{seed}", when, 24, sampling=sampling, constraint=Constraint(kind="regex", text=REGEX)))
    return made


def run(
    decoder: Decoder, vocabulary: Vocabulary, tokenizer: ChatTokenizer, num_samples: int = NUM_SAMPLES, *, with_planner: bool
) -> Driver:
    engine = tiny_engine(decoder, num_pages=600, page_size=16, profile=PROFILE)
    grammars: dict[Constraint, Grammar] = {}
    for number, request in enumerate(requests(tokenizer, num_samples)):
        assert request.constraint is not None
        if request.constraint not in grammars:
            grammars[request.constraint] = Grammar(request.constraint, vocabulary)
        assert engine.submit(request, None, grammar=grammars[request.constraint].start()) is None, number
    driver = Driver(engine)
    if with_planner:
        run_with_planner(driver, make_planner(PlannerConfig()))
    else:
        driver.run()
    return driver


def check(streams: Streams, tokenizer: ChatTokenizer) -> None:
    texts = {name: tokenizer.decode(tokens) for name, tokens in streams.tokens.items() if streams.reason(name) == "stop"}
    people = {name: text for name, text in texts.items() if name.startswith("json")}
    assert len(people) >= 30
    assert len(set(people.values())) > NUM_SAMPLES // 2
    for text in people.values():
        jsonschema.validate(json.loads(text), SCHEMA)
    times = [text for name, text in texts.items() if name.startswith("time")]
    assert len(times) == NUM_SAMPLES // 4
    assert all(re.fullmatch(REGEX, text) for text in times), times


def test_output_keeps_its_constraint_with_and_without_drafts(
    decoder: Decoder, vocabulary: Vocabulary, tokenizer: ChatTokenizer
) -> None:
    plain = run(decoder, vocabulary, tokenizer, with_planner=False)
    check(plain.streams, tokenizer)
    drafted = run(decoder, vocabulary, tokenizer, NUM_SAMPLES // 4, with_planner=True)
    assert drafted.streams.tokens == {name: plain.streams.tokens[name] for name in drafted.streams.tokens}
    assert drafted.engine.counters["accepted_tokens"] > 0
    assert drafted.engine.counters["draft_tokens"] > 10, "hardly any draft: that proves little"
