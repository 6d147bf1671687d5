"""The decoder's logits against transformers, for every way in which tokens can come into a batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from services.executor.batch import Segment, ancestor_mask, build_batch
from services.executor.model import Decoder, KvCache
from services.executor.verify import depths
from tests.helpers import CPU, new_cache
from tests.tiny import random_prompt, tiny_pair

PAGE = 4
TREE = (-1, 0, 0, 1, 1, 2, 4, 4, 6)


def slots_of(pages: Sequence[int], num_tokens: int) -> list[int]:
    """The slots of a sequence that lies on these pages, in this order."""
    return [pages[i // PAGE] * PAGE + i % PAGE for i in range(num_tokens)]


def oracle(model: Any, tokens: Sequence[int]) -> Tensor:
    """transformers' logits at every position."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits


def run(tokens: Sequence[int], start: int, end: int, slots: list[int]) -> Segment:
    """A causal run of a sequence whose tokens before `start` are in the cache."""
    return Segment(
        tokens=tokens[start:end],
        positions=range(start, end),
        context_slots=slots[:start],
        slots=slots[start:end],
        wants_logits="all",
    )


def tree(tokens: Sequence[int], parents: Sequence[int], start: int, slots: list[int]) -> Segment:
    """A draft tree whose root has position `start`; its nodes lie behind the root, in their order."""
    return Segment(
        tokens=tokens,
        positions=[start + depth for depth in depths(parents)],
        context_slots=slots[:start],
        slots=slots[start : start + len(tokens)],
        parents=parents,
        wants_logits="all",
    )


def forward(decoder: Decoder, cache: KvCache, *segments: Segment) -> list[Tensor]:
    """Logits of all rows, per segment."""
    batch = build_batch(segments, CPU)
    with torch.inference_mode():
        logits = decoder.logits(decoder.forward(batch, cache)[batch.logit_rows])
    return list(torch.split(logits, [len(segment.tokens) for segment in segments]))


def assert_logits(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.5, "the oracle's logits are too flat to tell anything"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def assert_tree_logits(
    model: Any, actual: Tensor, context: Sequence[int], tokens: Sequence[int], parents: Sequence[int]
) -> None:
    """Every node's logits are those of its root path run alone."""
    for node in range(len(tokens)):
        path = [i for i in range(len(tokens)) if ancestor_mask(parents)[node, i]]
        assert_logits(actual[node], oracle(model, [*context, *(tokens[i] for i in path)])[-1])


uncached_pair = tiny_pair.__wrapped__
"""For overrides that have no hash."""

FAMILIES: dict[str, Callable[[], tuple[Any, Decoder]]] = {
    "tied": lambda: tiny_pair(tie_word_embeddings=True),
    "untied": lambda: tiny_pair(tie_word_embeddings=False),
    "qwen2 with biases": lambda: tiny_pair("qwen2"),
    "one kv head": lambda: tiny_pair(num_key_value_heads=1, num_hidden_layers=3),
    "as many kv heads": lambda: tiny_pair(num_key_value_heads=4),
    "wide heads": lambda: tiny_pair(head_dim=20),
    "llama3 rope": lambda: uncached_pair(
        rope_parameters={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "linear rope": lambda: uncached_pair(rope_parameters={"rope_type": "linear", "factor": 4.0}),
    "attention biases": lambda: tiny_pair(attention_bias=True),
    "mistral": lambda: tiny_pair("mistral", sliding_window=None),
    "mistral with a window": lambda: tiny_pair("mistral", sliding_window=3),
    "mistral with a window over pages": lambda: tiny_pair("mistral", sliding_window=7, tie_word_embeddings=False),
    "qwen2 with an idle window": lambda: tiny_pair("qwen2", sliding_window=3, max_window_layers=0),
    "qwen2 with windows above": lambda: tiny_pair(
        "qwen2", sliding_window=3, use_sliding_window=True, max_window_layers=1, num_hidden_layers=3
    ),
    "qwen3": lambda: tiny_pair("qwen3", head_dim=12),
    "qwen3 with all it can have": lambda: tiny_pair(
        "qwen3",
        head_dim=12,
        tie_word_embeddings=False,
        attention_bias=True,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    ),
    "other theta": lambda: tiny_pair(rope_theta=500.0, rms_norm_eps=1e-3),
}


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[Any, Decoder]:
    return FAMILIES[request.param]()


def test_whole_prefill(pair: tuple[Any, Decoder]) -> None:
    model, decoder = pair
    for num_tokens in (1, 3, 4, 5, 23):
        tokens = random_prompt(num_tokens, seed=num_tokens)
        (logits,) = forward(decoder, new_cache(decoder), run(tokens, 0, num_tokens, slots_of((5, 2, 9, 3, 8, 11), num_tokens)))
        assert_logits(logits, oracle(model, tokens))


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_prefill_in_chunks_across_pages_and_token_by_token(pair: tuple[Any, Decoder], size: int) -> None:
    model, decoder = pair
    tokens, cache = random_prompt(22), new_cache(decoder)
    slots = slots_of((7, 1, 0, 12, 3, 4), 22)
    chunks = [forward(decoder, cache, run(tokens, i, min(i + size, 22), slots))[0] for i in range(0, 22, size)]
    assert_logits(torch.cat(chunks), oracle(model, tokens))


def test_a_draft_tree(pair: tuple[Any, Decoder]) -> None:
    model, decoder = pair
    context, nodes, cache = random_prompt(9), random_prompt(len(TREE), seed=1), new_cache(decoder)
    slots = slots_of((6, 3, 10, 2, 1), 20)
    forward(decoder, cache, run(context, 0, 9, slots))
    (logits,) = forward(decoder, cache, tree(nodes, TREE, 9, slots))
    assert_tree_logits(model, logits, context, nodes, TREE)


def test_roots_trees_and_chunks_of_many_sequences_in_one_pass(pair: tuple[Any, Decoder]) -> None:
    model, decoder = pair
    cache = new_cache(decoder, 256)
    rng = random.Random(3)
    pages = rng.sample(range(64), 64)
    prompts = [random_prompt(n, seed=n) for n in (1, 6, 13, 17, 30, 2)]
    slots = [slots_of(pages[10 * i : 10 * i + 10], 40) for i in range(6)]
    done = [1, 6, 13, 8, 7, 0]
    for i, prompt in enumerate(prompts):
        if done[i]:
            forward(decoder, cache, run(prompt, 0, done[i], slots[i]))
    star, chain = (-1, 0, 0, 0), tuple(range(-1, 20))
    trees = {1: (-1,), 2: TREE, 0: star, 5: (-1, 0)}
    nodes = {i: random_prompt(len(parents), seed=50 + i) for i, parents in trees.items()}
    deep = random_prompt(len(chain), seed=99)
    segments = [
        run(prompts[3], 8, 15, slots[3]),
        *(tree(nodes[i], parents, done[i], slots[i]) for i, parents in trees.items()),
        run(prompts[4], 7, 30, slots[4]),
    ]
    order = rng.sample(range(len(segments)), len(segments))
    results = forward(decoder, cache, *(segments[i] for i in order))
    logits = [results[order.index(i)] for i in range(len(segments))]
    assert_logits(logits[0], oracle(model, prompts[3][:15])[8:])
    for at, (i, parents) in enumerate(trees.items(), start=1):
        assert_tree_logits(model, logits[at], prompts[i][: done[i]], nodes[i], parents)
    assert_logits(logits[-1], oracle(model, prompts[4])[7:])
    (logits_chain,) = forward(decoder, cache, tree(deep, chain, 15, slots[3]))
    assert_tree_logits(model, logits_chain, prompts[3][:15], deep, chain)


def test_logits_can_be_asked_for_the_last_row_only() -> None:
    tokens, slots = random_prompt(7), slots_of((1, 2), 8)
    batch = build_batch(
        [
            Segment(tokens=tokens, positions=range(7), context_slots=(), slots=slots[:7], wants_logits="last"),
            Segment(tokens=tokens[:2], positions=range(2), context_slots=(), slots=[40, 41]),
        ],
        CPU,
    )
    assert batch.logit_rows.tolist() == [6]
    assert batch.starts == (0, 7)
