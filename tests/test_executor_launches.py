"""The operators of an iteration: their number does not depend on how much of what it holds, only on which kinds.

Counted on a CPU, where an operator is a call; on a GPU it is a launch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch

from common.messages import DraftTree, LoraSpec, Sampling
from kernels.native.build import library
from services.executor.backward import advance
from services.executor.backward_cursor import BackwardCursor
from services.executor.batch import Batch
from services.executor.engine import Engine
from services.executor.features import FeatureWish, PassFeatures
from services.executor.finetune import new_job
from services.executor.lora import LoraWeights
from services.executor.model import KvCache
from services.executor.training_sequence import heads
from services.executor.views import Limits
from tests.helpers import (
    OperatorCount,
    forward_sequence,
    new_cache,
    randn,
    random_adapter,
    random_tokens,
    training_sequence,
    training_slice,
)
from tests.tiny import random_prompt, set_trees, tiny_engine, tiny_pair, tiny_request

FEW, MANY = 3, 8
"""Not one: that takes shortcuts. Three adapters have all targets among them."""
PROMPT_LEN = 12


def engine_of(num_pages: int = 512) -> Engine:
    limits = Limits(max_batch_tokens=1024, max_iteration_ms=1e6, idle_iteration_ms=1e6, min_prefill_tokens=1024)
    return tiny_engine(tiny_pair()[1], num_pages=num_pages, limits=limits)


def decoding(engine: Engine, num_requests: int, *, num_adapters: int = 0, sampling: Sampling | None = None) -> None:
    """So many requests that decode, and have equally long contexts; the first ones each with an adapter of its own."""
    targets = (("q_proj", "v_proj"), ("k_proj", "o_proj", "up_proj", "down_proj"), LoraSpec().target_modules)
    for i in range(num_requests):
        if i < num_adapters:
            spec = LoraSpec(rank=(2, 4, 8)[i % 3], alpha=4.0, target_modules=targets[i % 3])
            engine.adapters[f"a{i}"] = random_adapter(engine.decoder, spec, seed=i)
        request = tiny_request(f"d{i}", random_prompt(PROMPT_LEN, seed=i), 64, sampling=sampling)
        assert engine.submit(request, f"a{i}" if i < num_adapters else None) is None
    while not all(sequence.is_decoding for sequence in engine.sequences.values()):
        engine.forward_pass()


def draft(engine: Engine, num_nodes: int) -> None:
    """A chain of so many nodes for each sequence."""
    set_trees(
        engine,
        *(
            DraftTree(
                request_id=name, length=len(s.tokens), tokens=(s.tokens[-1], *range(num_nodes)),
                parents=tuple(range(-1, num_nodes)), probs=(1.0,) * (num_nodes + 1), num_required=num_nodes,
            )
            for name, s in engine.sequences.items()
        ),
    )  # fmt: skip


def requests(n: int) -> Engine:
    engine = engine_of()
    decoding(engine, n)
    return engine


def features(n: int) -> Engine:
    """Requests whose hidden states a planner wants."""
    engine = requests(n)
    engine.feature_wish = FeatureWish((1, 2), 4)
    return engine


def sampled(n: int) -> Engine:
    engine = engine_of()
    decoding(engine, n, sampling=Sampling(temperature=0.8, top_p=0.9, seed=3))
    return engine


def adapters(n: int) -> Engine:
    engine = engine_of()
    decoding(engine, MANY, num_adapters=n)
    return engine


BOTTLENECKS = [
    LoraSpec(method="bottleneck", rank=2, non_linearity="relu", target_modules=("o_proj", "down_proj")),
    LoraSpec(method="bottleneck", rank=4, non_linearity="gelu", target_modules=("o_proj", "down_proj")),
    LoraSpec(method="bottleneck", rank=8, non_linearity="gelu", target_modules=("down_proj",)),
]


def bottlenecks(n: int) -> Engine:
    """Requests with bottleneck adapters of several sizes and activations."""
    engine = engine_of()
    engine.adapters |= {f"b{i}": random_adapter(engine.decoder, BOTTLENECKS[i % 3], seed=i) for i in range(n)}
    for i in range(MANY):
        request = tiny_request(f"d{i}", random_prompt(PROMPT_LEN, seed=i), 64)
        assert engine.submit(request, f"b{i}" if i < n else None) is None
    engine.forward_pass()
    return engine


def trees(n: int) -> Engine:
    engine = engine_of()
    decoding(engine, n)
    draft(engine, 3)
    return engine


def short_chunks(n: int) -> Engine:
    engine = engine_of()
    for i in range(n):
        engine.submit(tiny_request(f"p{i}", random_prompt(PROMPT_LEN, seed=i), 8), None)
    return engine


def long_chunks(n: int) -> Engine:
    engine = engine_of()
    for i in range(n):
        engine.submit(tiny_request(f"p{i}", random_prompt(40, seed=i), 8), None)
    return engine


def contexts(n: int) -> Engine:
    """Requests whose contexts differ in length by up to a factor of 2^n."""
    engine = engine_of()
    for i in range(MANY):
        engine.submit(tiny_request(f"p{i}", random_prompt(min(2 ** (i % n), 200), seed=i), 8), None)
    engine.forward_pass()
    return engine


def bottleneck_jobs(n: int) -> Engine:
    return jobs(n, [BOTTLENECKS[i % 3] for i in range(n)])


def jobs(n: int, specs: Sequence[LoraSpec] | None = None) -> Engine:
    """Finetuning jobs with an equally long window each; their tapes are there, as they are from the second window on."""
    engine = engine_of()
    for i in range(n):
        spec = LoraSpec(rank=2 + i, alpha=8.0) if specs is None else specs[i]
        job = new_job(f"job{i}", spec, i, engine.decoder, engine.cache)
        engine.training.open(job, lease=1)
        item = training_slice(random_prompt(PROMPT_LEN, seed=i))
        fields = {name: getattr(item, name) for name in item.__struct_fields__} | {"job_id": f"job{i}"}
        engine.training.accept(type(item)(**fields))
    engine.training.views()
    return engine


Kind = Callable[[int], Engine]
without_compiler = pytest.mark.xfail(
    library() is None, strict=True, reason="kernels.attention: calls for long segments, doublings of lengths, and each mask"
)


def count_layers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The operators of all layers, when the batch has been arranged."""
    batches: list[Batch] = []
    forward = engine.decoder.forward

    def remembered(batch: Batch, cache: KvCache, features: PassFeatures) -> torch.Tensor:
        batches.append(batch)
        return forward(batch, cache, features)

    monkeypatch.setattr(engine.decoder, "forward", remembered)
    iteration = engine.forward_pass()
    monkeypatch.undo()
    kinds = (iteration.decode_tokens, iteration.draft_tokens, iteration.prefill_tokens, iteration.finetune_tokens)
    assert sum(kinds) == len(batches[0].tokens_T)
    with torch.inference_mode(), OperatorCount() as operators:
        forward(batches[0], engine.cache)
    return Counter(operators.by_name)


LAYERS = [
    requests, features, adapters, bottlenecks, trees, short_chunks, jobs, bottleneck_jobs,
    pytest.param(long_chunks, marks=without_compiler), pytest.param(contexts, marks=without_compiler),
]  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_the_operators_of_the_layers_do_not_grow(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (count_layers(kind(n), monkeypatch) for n in (FEW, MANY))
    assert few.total() > 40
    assert many - few == Counter()


PASSES = [
    adapters, bottlenecks, *(pytest.param(kind, marks=without_compiler) for kind in (requests, trees, short_chunks, jobs)),
    *(pytest.param(kind, marks=without_compiler) for kind in (bottleneck_jobs, long_chunks, contexts, sampled)),
]  # fmt: skip


@pytest.mark.parametrize("kind", PASSES)
def test_the_operators_of_a_whole_pass_do_not_grow(kind: Kind) -> None:
    """With what arranges the batch before its layers, and losses or draws behind them."""
    totals: list[Counter[str]] = []
    for n in (FEW, MANY):
        engine = kind(n)
        with OperatorCount() as operators:
            engine.forward_pass()
        totals.append(operators.by_name)
    assert totals[1] - totals[0] == Counter()


def test_the_losses_of_many_windows_take_the_operators_of_one() -> None:
    decoder = tiny_pair()[1]
    totals = []
    for n in (1, MANY):
        sequences = [training_sequence(training_slice(random_prompt(PROMPT_LEN, seed=i)), decoder) for i in range(n)]
        hidden_TH = randn(n * 5, decoder.config.hidden_size).float()
        with OperatorCount() as operators:
            heads([(sequence, 0, 5) for sequence in sequences], hidden_TH)
        totals.append(operators.by_name)
        assert {sequence.num_forwarded for sequence in sequences} == {5}
    assert totals[0] == totals[1] != Counter()


def backward_operators(num_jobs: int, num_sequences: int, specs: Sequence[LoraSpec] = ()) -> Counter[str]:
    """Of a unit per layer that goes back through all sequences of all jobs, which have targets and ranks of their own."""
    decoder = tiny_pair()[1]
    cache = new_cache(decoder, num_slots=1024)
    cursors: list[BackwardCursor] = []
    for i in range(num_jobs):
        targets = LoraSpec().target_modules[: 4 if i % 3 == 2 else 7]
        usual = LoraSpec(rank=(2, 4, 8)[i % 3], alpha=4.0, target_modules=targets)
        adapter = random_adapter(decoder, specs[i % len(specs)] if specs else usual, seed=i)
        grads = LoraWeights(adapter.spec, decoder.config)
        for _ in range(num_sequences):
            sequence = training_sequence(training_slice(random_tokens(decoder, PROMPT_LEN)), decoder, adapter)
            first = len(cursors) * PROMPT_LEN
            forward_sequence(decoder, cache, sequence, adapter, [PROMPT_LEN], range(first, first + PROMPT_LEN))
            cursors.append(BackwardCursor(decoder, adapter, grads, sequence))
    num_rows = sum(cursor.num_rows for cursor in cursors)
    with torch.inference_mode(), OperatorCount() as operators:
        assert advance(decoder, cache, cursors, num_rows * decoder.config.num_layers) == num_rows * decoder.config.num_layers
    assert all(cursor.is_done for cursor in cursors)
    return Counter(operators.by_name)


def test_the_operators_of_the_backward_pass_do_not_grow() -> None:
    few = backward_operators(FEW, 1)
    assert few.total() > 40
    assert backward_operators(MANY, 1) - few == Counter()
    assert backward_operators(FEW, 4) - few == Counter()
    assert backward_operators(1, MANY) - backward_operators(1, FEW) == Counter()


def test_nor_do_those_of_bottlenecks() -> None:
    specs = BOTTLENECKS[:2]
    backward_operators(2, 1, specs)  # identity matrices are made once
    few = backward_operators(4, 1, specs)
    assert few.total() > 40
    assert backward_operators(10, 1, specs) - few == Counter()
    assert backward_operators(4, 3, specs) - few == Counter()
