"""SmolLM2-135M-Instruct in fp32: greedy output is that of transformers, token for token, with and without drafts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from common.fingerprint import fingerprint
from common.messages import IterationReport, LatencyProfile
from services.executor.engine import Engine, Iteration
from services.executor.features import FeatureWish
from services.executor.loader import load_decoder
from services.executor.model import Decoder
from services.planner.actor import make_planner
from services.planner.config import PlannerConfig
from services.planner.planner import Planner
from tests.helpers import CPU
from tests.tiny import Driver, greedy, set_trees, tiny_engine, tiny_request

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]

NUM_TOKENS = 32
PROFILE = LatencyProfile(points=((1, 60.0), (16, 70.0), (64, 110.0), (256, 300.0), (1024, 1100.0)))
Prompts = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    """A model of this size gains from them, tiny ones do not."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts(real_model_dir: Path) -> Prompts:
    tokenizer = Tokenizer.from_file(str(real_model_dir / "tokenizer.json"))
    lines = (Path(__file__).parent / "data" / "humaneval20.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    assert len(problems) == 20
    return {problem["task_id"]: tuple(tokenizer.encode(problem["prompt"]).ids) for problem in problems}


@pytest.fixture(scope="module")
def generated(real_model_dir: Path, prompts: Prompts) -> dict[str, list[int]]:
    """The reference: one prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32)
    return {name: greedy(model, prompt, NUM_TOKENS) for name, prompt in prompts.items()}


@pytest.fixture(scope="module")
def decoder(real_model_dir: Path) -> Decoder:
    return load_decoder(real_model_dir, torch.float32, CPU)


@pytest.fixture
def engine(decoder: Decoder, prompts: Prompts) -> Engine:
    """All prompts are submitted, so that they share passes."""
    made = tiny_engine(decoder, num_pages=400, page_size=16, profile=PROFILE)
    for i, (name, prompt) in enumerate(prompts.items()):
        made.submit(tiny_request(name, prompt, NUM_TOKENS, ignore_eos=True, arrived_at=float(i)), None)
    return made


def report_of(engine: Engine, iteration: Iteration) -> IterationReport:
    """What the executor's actor tells its planner."""
    num_decoding = sum(sequence.is_decoding for sequence in engine.sequences.values())
    return IterationReport(
        executor_id="executor",
        iteration=iteration.number,
        opened=iteration.opened,
        closed=tuple(chunk.request_id for chunk in iteration.chunks if chunk.finish_reason),
        progress=iteration.progress,
        token_budget=64,
        base_tokens=num_decoding,
        t_spec_ms=80.0,
        latency=engine.profile,
    )


def run_with_planner(driver: Driver, planner: Planner) -> None:
    while driver.engine.has_work:
        iteration = driver.step()
        set_trees(driver.engine, *planner.answer(report_of(driver.engine, iteration), now=float(iteration.number)))


def test_without_speculation(engine: Engine, generated: dict[str, list[int]]) -> None:
    assert Driver(engine).run().tokens == generated
    assert engine.counters["draft_tokens"] == 0


def test_with_the_planners_drafts(engine: Engine, generated: dict[str, list[int]]) -> None:
    driver = Driver(engine)
    run_with_planner(driver, make_planner(PlannerConfig()))
    assert driver.streams.tokens == generated
    assert engine.counters["trees_late"] == engine.counters["trees_invalid"] == engine.counters["trees_orphaned"] == 0
    assert engine.counters["accepted_tokens"] > 50, "hardly any draft was right: that proves little"
    assert engine.counters["draft_tokens"] > engine.counters["accepted_tokens"]


@pytest.mark.slow
def test_with_the_shipped_drafter(engine: Engine, generated: dict[str, list[int]], real_model_dir: Path) -> None:
    """n-grams and the head on hidden states, which is found by the model's folder."""
    planner = make_planner(PlannerConfig(model_dir=str(real_model_dir)))
    assert planner.need is not None
    assert planner.need.fingerprint == fingerprint(real_model_dir)
    engine.feature_wish = FeatureWish(planner.need.layers, planner.need.window)
    driver = Driver(engine)
    run_with_planner(driver, planner)
    assert driver.streams.tokens == generated
    assert engine.counters["trees_late"] == engine.counters["trees_invalid"] == engine.counters["trees_orphaned"] == 0
    assert engine.counters["accepted_tokens"] > 50, "hardly any draft was right: that proves little"
