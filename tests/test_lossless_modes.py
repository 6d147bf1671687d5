"""Planner and engine together on a tiny model in fp32: greedy output is plain decoding's, whatever drafts, chooses or ends."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.messages import IterationReport, SequenceProgress, Slo
from services.executor.features import FeatureWish
from services.gateway.text_stream import TextStream
from services.planner import model
from services.planner.actor import make_planner
from services.planner.config import PlannerConfig
from services.planner.planner import Planner
from tests.draft_folders import features_folder, model_folder, near_model_folder
from tests.test_executor_samples import adapters
from tests.tiny import (
    NUM_TOKENS,
    Driver,
    all_requests,
    ending_at,
    random_prompt,
    serve,
    set_trees,
    tiny_engine,
    tiny_pair,
    tiny_request,
    truth,
)

MODES = ("heddle", "adaserve", "throughput", "slo", "equal", "chain:3", "none")
DRAFTERS = ("ngram", "features", "model", "ngram,features,model")
GENEROUS = [(mode, draft) for mode in ("heddle", "adaserve") for draft in DRAFTERS if (mode, draft) != ("heddle", "model")]
"""They draft so much that the end of a text is among it; alone, the near model is too unsure for the default to go so far."""
ADAPTED = {"r2": "a", "r5": "b"}
STOPPED = ("r3", "r4")
END = truth()["r1"][NUM_TOKENS * 2 // 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the drafters with weights, by kind."""
    path = tmp_path_factory.mktemp("drafters")
    target = model_folder(path / "tiny")
    return {
        "target": target,
        "features": features_folder(path / "features", target),
        "model": near_model_folder(path / "near"),
    }


@pytest.fixture(autouse=True)
def whatever_it_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is never sure of anything; it drafts all the same."""
    monkeypatch.setattr(model, "MIN_GAIN", 0.0)


def planner_of(mode: str, draft: str, folders: dict[str, Path]) -> Planner:
    kinds = [f"{kind}:{folders[kind]}" if kind in folders else kind for kind in draft.split(",")]
    config = PlannerConfig(
        mode=mode, draft=",".join(kinds), model_dir=str(folders["target"]), min_prob=0.001, max_depth=5, max_width=2
    )
    return make_planner(config, clock=itertools.count(0.0, 0.001).__next__)  # however busy this machine is


def spelled(tokens: Sequence[int]) -> str:
    """Two letters for each token, so that a stop string can begin in the middle of one."""
    return "".join(f"{chr(97 + token // 10)}{chr(65 + token % 10)}" for token in tokens)


@functools.cache
def plain() -> dict[str, list[int]]:
    """What each request gets from plain decoding, alone: without speculation, cached prefixes or neighbours."""
    found = {}
    for request in all_requests():
        name, engine = request.request_id, tiny_engine(ending_at(tiny_pair()[1], END), prefix_cache=False)
        engine.adapters |= adapters(engine.decoder)
        found[name] = serve(engine.decoder, request, adapters=ADAPTED, engine=engine).streams.tokens[name]
        if name not in ADAPTED:
            assert found[name] == [*itertools.takewhile(lambda t: t != END, truth()[name]), END][:NUM_TOKENS]
    return found


class Client:
    """Reads the streams as a gateway does: text until a stop string, and then no more is wanted."""

    def __init__(self, stops: dict[str, str]) -> None:
        self.texts: dict[str, str] = defaultdict(str)
        self.stopped: set[str] = set()
        self._streams = {name: TextStream(spelled, stops=[stops[name]] if name in stops else []) for name in plain()}

    def read(self, driver: Driver) -> None:
        """Take the last iteration's chunks."""
        for chunk in driver.iterations[-1].chunks:
            name = chunk.request_id
            pieces = [self._streams[name].push(chunk.tokens)]
            if chunk.finish_reason and not pieces[0].stopped:
                pieces.append(self._streams[name].finish())
            self.texts[name] += "".join(piece.text for piece in pieces)
            if any(piece.stopped for piece in pieces):
                self.stopped.add(name)
                driver.engine.cancel(name)


def run_with_planner(driver: Driver, planner: Planner, client: Client | None = None) -> dict[str, list[int]]:
    """The tokens of all requests, drafted for as over the bus."""
    engine = driver.engine
    engine.feature_wish = FeatureWish() if planner.need is None else FeatureWish(planner.need.layers, planner.need.window)
    while engine.has_work:
        iteration = driver.step()
        if client is not None:
            client.read(driver)
        report = IterationReport(
            executor_id="executor",
            iteration=iteration.number,
            opened=iteration.opened,
            closed=tuple(chunk.request_id for chunk in iteration.chunks if chunk.request_id not in engine.sequences),
            progress=iteration.progress,
            token_budget=48,
            base_tokens=sum(sequence.is_decoding for sequence in engine.sequences.values()),
            t_spec_ms=5.0,
            latency=engine.profile,
        )
        set_trees(engine, *planner.answer(report, now=float(iteration.number)))
    assert engine.counters["trees_invalid"] == engine.counters["trees_over_budget"] == 0
    return driver.streams.tokens


@pytest.mark.parametrize("draft", DRAFTERS)
@pytest.mark.parametrize("mode", MODES)
def test_greedy_output_is_that_of_plain_decoding(mode: str, draft: str, folders: dict[str, Path]) -> None:
    """The same prompts again and again, so that later ones are drafted from the traffic and found in the prefix cache; two
    adapters; a cache so small that sequences are preempted; an end token inside trees; stop strings that end amid tokens.
    """
    engine = tiny_engine(ending_at(tiny_pair()[1], END), num_pages=28, max_draft_tokens=48)
    engine.adapters |= adapters(engine.decoder)
    planner = planner_of(mode, draft, folders)
    stops = {name: spelled(plain()[name])[2 * NUM_TOKENS // 3 * 2 - 1 :][:4] for name in STOPPED}
    steps: list[SequenceProgress] = []
    for salt in "aab" if "ngram" in draft else "aa":
        driver, client = Driver(engine), Client(stops)
        for request in all_requests(cache_salt=salt, slo=Slo(tpot_ms=2.0)):
            assert engine.submit(request, ADAPTED.get(request.request_id)) is None
        tokens = run_with_planner(driver, planner, client)
        steps += [step for iteration in driver.iterations for step in iteration.progress]
        assert client.stopped == set(STOPPED)
        for name, expected in plain().items():
            assert client.texts[name] == spelled(expected).split(stops.get(name, " "))[0], name
            assert tokens[name] == (expected if name not in STOPPED else expected[: len(tokens[name])])
    assert engine.counters["preemptions"] > 0
    assert engine.counters["prefix_cache_hits"] > 0
    ends_drafted = [step for step in steps if step.tokens[-1] == END and step.accepted_len == len(step.tokens)]
    assert ends_drafted or (mode, draft) not in GENEROUS, "no end token was ever inside a tree"
    assert (engine.counters["accepted_tokens"] > 12) == (mode != "none"), "hardly a draft was right: that proves little"


def test_a_tenants_traffic_is_drafted_from_and_anothers_is_not() -> None:
    """By the planner's own account, with requests as the executor opens them."""
    _, decoder = tiny_pair()
    prompt = random_prompt(12, seed=5)
    accepted = []
    for salts in (("x", "x"), ("x", "y")):
        engine, planner = tiny_engine(decoder), make_planner(PlannerConfig(mode="throughput"))
        for i, salt in enumerate(salts):
            before = engine.counters["accepted_tokens"]
            driver = Driver(engine)
            assert engine.submit(tiny_request(f"q{i}", prompt, NUM_TOKENS, cache_salt=salt), None) is None
            run_with_planner(driver, planner)
        accepted.append(engine.counters["accepted_tokens"] - before)
    same, other = accepted
    assert same > other
