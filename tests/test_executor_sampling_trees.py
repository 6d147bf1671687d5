"""Three words through pruned draft trees, by the executor's own draws: of the target's distribution, with penalties too."""

from __future__ import annotations

import functools
import itertools
import math
import random
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

import kernels.sampling
from common.messages import DraftTree, Sampling
from kernels import ops
from services.executor.assembly import Work
from services.executor.batch import Segment
from services.executor.draws import drawn_by
from services.executor.logits import LogitsProcessor, processor_of
from services.executor.pages import PageAllocator
from services.executor.sampling import Draws, target_probabilities
from services.executor.sequences import Sequence as Running
from services.executor.verify import accept, depths, prune
from tests.test_executor_sampling import NUM_DRAWS, Prefix, chi_square
from tests.tiny import tiny_request

VOCABULARY = range(4)
PROMPT = 2
"""One word, which the repetition penalty sees."""
BATCH = 2000
PLAIN = Sampling(temperature=1.0)
PENALISED = Sampling(temperature=1.2, top_k=3, top_p=0.97, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4)
WISHES = pytest.mark.parametrize("wish", [PLAIN, PENALISED], ids=["plain", "penalties, top_p and top_k"])


@functools.cache
def logits_after(prefix: Prefix) -> Tensor:
    """A language model of four words."""
    generator = torch.Generator().manual_seed(17 + sum((word + 1) * 5**i for i, word in enumerate(prefix)))
    return torch.randn(4, generator=generator)


@functools.cache
def target(prefix: Prefix, wish: Sampling) -> list[float]:
    """The distribution after this output, with the penalties as their formulas are written."""
    counts, values = Counter(prefix), []
    for word, logit in enumerate(logits_after(prefix).double().tolist()):
        if word == PROMPT or word in counts:
            logit = logit / wish.repetition_penalty if logit > 0 else logit * wish.repetition_penalty
        values.append(logit - counts[word] * wish.frequency_penalty - (word in counts) * wish.presence_penalty)
    found: list[float] = target_probabilities(torch.tensor(values, dtype=torch.float64), wish).tolist()
    return found


@functools.cache
def drafter(prefix: Prefix, wish: Sampling) -> list[float]:
    """What a drafter believes: near the target, but not the same; it excludes no word."""
    generator = torch.Generator().manual_seed(23 + len(prefix) + sum(prefix))
    near = torch.tensor(target(prefix, wish)).clamp(min=0.02).log() + 0.7 * torch.randn(4, generator=generator)
    return torch.softmax(near, 0).tolist()


@functools.cache
def drafted_tree(wish: Sampling) -> DraftTree:
    """The four likeliest nodes of two levels, by the drafter: a choice by probability, the same every time."""
    tokens, parents, probs = [PROMPT], [-1], [1.0]
    for first in VOCABULARY:
        tokens, parents, probs = [*tokens, first], [*parents, 0], [*probs, drafter((), wish)[first]]
    for first, second in itertools.product(VOCABULARY, repeat=2):
        prob = probs[1 + first] * drafter((first,), wish)[second]
        tokens, parents, probs = [*tokens, second], [*parents, 1 + first], [*probs, prob]
    full = DraftTree(request_id="r", length=1, tokens=tuple(tokens), parents=tuple(parents), probs=tuple(probs))
    return prune(full, 4)


def prefix_of(tree: DraftTree, node: int) -> Prefix:
    return () if node == 0 else (*prefix_of(tree, tree.parents[node]), tree.tokens[node])


def work_of(tree: DraftTree, output: Prefix, sampling: Sampling, processor: LogitsProcessor | None) -> Work:
    """A request that has this output, and the tree below it, as they are in a pass."""
    tokens = [PROMPT, *output]
    request = tiny_request("r", [PROMPT], 9, sampling=sampling)
    sequence = Running(
        request=request,
        tokens=tokens,
        table=PageAllocator(1, 1).table(),
        adapter=None,
        stop_ids=frozenset(),
        first_token_due_at=None,
        num_output=len(output),
        processor=processor,
    )
    positions = [len(output) + depth for depth in depths(tree.parents)]
    segment = Segment(
        tokens=tree.tokens, positions=positions, context_slots=(), slots=(), parents=tree.parents, wants_logits="all"
    )
    return Work(sequence, segment, is_decode=True)


def verified(tree: DraftTree, output: Prefix, samplings: Sequence[Sampling]) -> list[Prefix]:
    """The outputs of requests that all have this output and this tree, after one pass."""
    rows = torch.stack([logits_after((*output, *prefix_of(tree, node))) for node in range(len(tree.tokens))])
    processor = processor_of(samplings[0], [PROMPT], (), len(VOCABULARY))
    works = [work_of(tree, output, sampling, processor) for sampling in samplings]
    starts = [i * len(rows) for i in range(len(works))]
    hidden_TH = torch.zeros(len(works) * len(rows), 1)
    found = drawn_by(works, Draws(rows.repeat(len(works), 1)), starts, hidden_TH, lambda hidden: hidden)
    return [(*output, *accept(tree.tokens, tree.parents, drawn).tokens) for drawn in found]


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same changes of the same logits, and their distribution, are computed once: not 60,000 times. Draws are not."""
    apply = LogitsProcessor.apply
    changed: dict[Any, Tensor] = {}
    cumulative: dict[tuple[float, ...], list[float]] = {}

    def applied(process: LogitsProcessor, logits_V: Tensor, output: list[int]) -> Tensor:
        key = (*logits_V.tolist(), *output)
        if key not in changed:
            changed[key] = apply(process, logits_V, output)
        return changed[key]

    def draw_tokens(logits_RV: Tensor, draws: Sequence[ops.Draw]) -> list[int]:
        ((key,), (draw,)) = [tuple(row) for row in logits_RV.tolist()], draws
        if key not in cumulative:
            cumulative[key] = list(itertools.accumulate(kernels.sampling.target_probabilities(logits_RV, draws)[0].tolist()))
        return [bisect_right(cumulative[key], draw.uniform * cumulative[key][-1])]

    monkeypatch.setattr(LogitsProcessor, "apply", applied)
    monkeypatch.setattr(ops, "draw_tokens", draw_tokens)


def target_only(wish: Sampling) -> Counter[Prefix]:
    """The executor's rule: accept along the tree, then decode what is missing from a root alone."""
    tree, root = drafted_tree(wish), prune(drafted_tree(wish), 0)
    counts: Counter[Prefix] = Counter()
    for first in range(0, NUM_DRAWS, BATCH):
        waiting: dict[Prefix, list[Sampling]] = {
            (): [msgspec.structs.replace(wish, seed=seed) for seed in range(first, first + BATCH)]
        }
        for level in range(3):
            following = defaultdict[Prefix, list[Sampling]](list)
            for output, samplings in waiting.items():
                shape = tree if level == 0 else msgspec.structs.replace(root, tokens=((PROMPT, *output)[-1],))
                for sampling, words in zip(samplings, verified(shape, output, samplings), strict=True):
                    following[words[:3]].append(sampling)
            counts.update({words: len(done) for words, done in following.items() if len(words) == 3})
            waiting = {words: rest for words, rest in following.items() if len(words) < 3}
    return counts


def rejection(wish: Sampling) -> Counter[Prefix]:
    """The p/q rejection rule, which is right for trees that were sampled from the drafter, and wrong here."""
    tree = drafted_tree(wish)
    return Counter(_rejected(tree, wish, random.Random(seed)) for seed in range(NUM_DRAWS))


def _rejected(tree: DraftTree, wish: Sampling, rng: random.Random) -> Prefix:
    node, words = 0, Prefix()
    while len(words) < 3:
        probs, believed, taken = target(words, wish), drafter(words, wish), None
        for child in (i for i, parent in enumerate(tree.parents) if parent == node and i > 0):
            word = tree.tokens[child]
            if rng.random() < min(1.0, probs[word] / believed[word]):
                taken = child
                break
            rest = [max(p - q, 0.0) for p, q in zip(probs, believed, strict=True)]
            probs = [p / sum(rest) for p in rest]
        word = rng.choices(VOCABULARY, probs)[0] if taken is None else tree.tokens[taken]
        words, node = (*words, word), -2 if taken is None else taken
    return words


def goodness_of(rule: Callable[[Sampling], Counter[Prefix]], wish: Sampling) -> float:
    expected = {
        words: math.prod(target(words[:n], wish)[words[n]] for n in range(3))
        for words in itertools.product(VOCABULARY, repeat=3)
    }
    drawn = rule(wish)
    assert drawn.total() >= 20_000
    return chi_square(drawn, expected)


@WISHES
def test_the_tree_has_two_levels_and_is_pruned(wish: Sampling) -> None:
    tree = drafted_tree(wish)
    assert sorted({len(prefix_of(tree, node)) for node in range(5)}) == [0, 1, 2]


def test_penalties_change_the_distribution_that_is_tested() -> None:
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        without: Any = {name: float(name == "repetition_penalty")}
        assert target((1, 1), PENALISED) != target((1, 1), msgspec.structs.replace(PENALISED, **without)), name


@pytest.mark.usefixtures("remembered")
@WISHES
def test_words_through_a_tree_have_the_target_distribution(wish: Sampling) -> None:
    assert goodness_of(target_only, wish) < 1


@WISHES
def test_the_rejection_rule_is_refuted_by_the_same_test(wish: Sampling) -> None:
    assert goodness_of(rejection, wish) > 3
