"""Checking, cutting and accepting draft trees, on plain ints."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from common.messages import DraftTree
from services.executor.verify import InvalidTreeError, Verdict, accept, check_tree, depths, prune

CHAIN = (-1, 0, 1, 2, 3)
STAR = (-1, 0, 0, 0, 0)
BINARY = (-1, 0, 0, 1, 1, 2, 2)


def tree(shape: tuple[int, ...], **fields: Any) -> DraftTree:
    """A valid tree that continues [..., 10] of three tokens; node i > 0 holds token 10 + i."""
    values: dict[str, Any] = {
        "request_id": "r",
        "length": 3,
        "tokens": tuple(range(10, 10 + len(shape))),
        "parents": shape,
        "probs": tuple(1.0 / (1 + depth) for depth in depths(shape)),
    }
    return DraftTree(**(values | fields))


def check(candidate: DraftTree, max_nodes: int = 8, max_length: int = 100) -> None:
    check_tree(candidate, [1, 2, 10], vocab_size=40, max_nodes=max_nodes, max_length=max_length)


@pytest.mark.parametrize(
    ("parents", "expected"),
    [((-1,), [0]), (CHAIN, [0, 1, 2, 3, 4]), (STAR, [0, 1, 1, 1, 1]), (BINARY, [0, 1, 1, 2, 2, 2, 2])],
)
def test_depths(parents: tuple[int, ...], expected: list[int]) -> None:
    assert depths(parents) == expected


@pytest.mark.parametrize(
    ("tokens", "parents", "drawn", "verdict"),
    [
        pytest.param([5], (-1,), [7], Verdict((), (7,)), id="root alone"),
        pytest.param([5, 6, 7, 8, 9], CHAIN, [6, 7, 8, 9, 4], Verdict((1, 2, 3, 4), (6, 7, 8, 9, 4)), id="whole chain"),
        pytest.param([5, 6, 7, 8, 9], CHAIN, [6, 7, 0, 9, 4], Verdict((1, 2), (6, 7, 0)), id="half of a chain"),
        pytest.param([5, 6, 7, 8, 9], CHAIN, [7, 7, 8, 9, 4], Verdict((), (7,)), id="a later node is no child of the root"),
        pytest.param([5, 6, 7, 8, 9], STAR, [8, 0, 0, 3, 0], Verdict((3,), (8, 3)), id="one ray of a star"),
        pytest.param([5, 6, 7, 1, 2, 3, 4], BINARY, [7, 0, 3, 0, 0, 9, 0], Verdict((2, 5), (7, 3, 9)), id="binary"),
        pytest.param([5, 6, 7, 1, 1, 1, 1], BINARY, [7, 1, 1, 0, 0, 8, 0], Verdict((2, 5), (7, 1, 8)), id="cousins alike"),
        pytest.param([5, 5, 5], (-1, 0, 1), [5, 5, 5], Verdict((1, 2), (5, 5, 5)), id="one token again and again"),
    ],
)
def test_accept_walks_down_while_the_drawn_token_is_a_child(
    tokens: list[int], parents: tuple[int, ...], drawn: list[int], verdict: Verdict
) -> None:
    assert accept(tokens, parents, drawn) == verdict


def test_the_first_of_two_equal_siblings_is_taken() -> None:
    assert accept([5, 6, 6, 7], (-1, 0, 0, 2), [6, 9, 7, 8]) == Verdict((1,), (6, 9))


def test_an_accepted_path_is_a_path_and_ends_where_no_child_fits() -> None:
    rng = random.Random(0)
    lengths = set()
    for _ in range(500):
        parents = [-1, *(rng.randrange(node) for node in range(1, rng.randint(1, 12)))]
        tokens = [rng.randrange(3) for _ in parents]
        drawn = [rng.randrange(3) for _ in parents]
        verdict = accept(tokens, parents, drawn)
        steps = list(zip((0, *verdict.path), verdict.tokens, strict=True))
        assert all(token == drawn[node] for node, token in steps)
        for child, (node, token) in zip(verdict.path, steps, strict=False):
            assert parents[child] == node
            assert tokens[child] == token
        last, bonus = steps[-1]
        assert not any(parents[node] == last and tokens[node] == bonus for node in range(1, len(parents)))
        lengths.add(len(verdict.path))
    assert len(lengths) > 3


@pytest.mark.parametrize("parents", [(-1,), CHAIN, STAR, BINARY])
def test_good_trees_pass(parents: tuple[int, ...]) -> None:
    check(tree(parents))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"length": 2}, "late"),
        ({"length": 4}, "late"),
        ({"tokens": (9, 11, 12, 13, 14)}, "late"),
        ({"tokens": (), "parents": (), "probs": ()}, "late"),
        ({"parents": (-1, 0, 1, 2)}, "differ"),
        ({"probs": (1.0, 0.5, 0.4, 0.3)}, "differ"),
        ({"tokens": (10, 11, 12, 13)}, "differ"),
        ({"parents": (0, 0, 1, 2, 3)}, "parents"),
        ({"parents": (-1, -1, 1, 2, 3)}, "parents"),
        ({"parents": (-1, 0, 2, 2, 3)}, "parents"),
        ({"parents": (-1, 0, 3, 2, 3)}, "parents"),
        ({"parents": (-1, 0, 1, 2, 99)}, "parents"),
        ({"tokens": (10, 11, 12, 40, 14)}, "token"),
        ({"tokens": (10, 11, 12, -1, 14)}, "token"),
        ({"probs": (1.0, 0.5, float("nan"), 0.3, 0.2)}, "probs"),
        ({"probs": (1.0, 0.5, float("inf"), 0.3, 0.2)}, "probs"),
        ({"probs": (1.0, 0.5, -0.1, 0.3, 0.2)}, "probs"),
        ({"probs": (1.0, 1.5, 0.4, 0.3, 0.2)}, "probs"),
        ({"num_required": -1}, "num_required"),
    ],
)
def test_malformed_trees_raise_one_error(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidTreeError, match=reason):
        check(tree(CHAIN, **fields))


def test_a_tree_has_at_most_max_nodes_beside_its_root() -> None:
    check(tree(CHAIN), max_nodes=4)
    with pytest.raises(InvalidTreeError, match="limit is 3"):
        check(tree(CHAIN), max_nodes=3)


def test_a_tree_ends_within_the_models_positions() -> None:
    check(tree(CHAIN), max_length=7)
    with pytest.raises(InvalidTreeError, match="deeper"):
        check(tree(CHAIN), max_length=6)
    check(tree(STAR), max_length=4)


def test_prune_keeps_the_most_probable_nodes_and_renumbers_their_parents() -> None:
    full = tree(BINARY, probs=(1.0, 0.3, 0.6, 0.1, 0.2, 0.5, 0.4), num_required=5)
    pruned = prune(full, 3)
    assert pruned.tokens == (10, 12, 15, 16)
    assert pruned.parents == (-1, 0, 1, 1)
    assert pruned.probs == (1.0, 0.6, 0.5, 0.4)
    assert pruned.num_required == 3
    assert (pruned.request_id, pruned.length) == (full.request_id, full.length)


def test_prune_without_need_changes_nothing() -> None:
    full = tree(BINARY)
    assert prune(full, 6) is full
    assert prune(full, 99) is full


def test_prune_to_nothing_leaves_the_root() -> None:
    assert prune(tree(BINARY), 0).tokens == (10,)


def test_prune_of_equally_probable_nodes_takes_the_upper_ones() -> None:
    assert prune(tree(CHAIN, probs=(1.0, 0.5, 0.5, 0.5, 0.5)), 2).tokens == (10, 11, 12)


def test_prune_drops_nodes_whose_ancestors_do_not_fit() -> None:
    rising = tree(CHAIN, probs=(1.0, 0.1, 0.2, 0.3, 0.4))
    assert prune(rising, 2).tokens == (10,)


def test_pruned_trees_are_well_formed_subtrees() -> None:
    rng = random.Random(1)
    for _ in range(300):
        size = rng.randint(1, 12)
        parents = (-1, *(rng.randrange(node) for node in range(1, size)))
        probs = [1.0]
        for node in range(1, size):
            probs.append(probs[parents[node]] * rng.random())
        full = tree(parents, probs=tuple(probs))
        num_nodes = rng.randint(0, size)
        pruned = prune(full, num_nodes)
        assert len(pruned.tokens) - 1 == min(num_nodes, size - 1)
        check(pruned, max_nodes=20)
        by_token = dict(zip(full.tokens, zip(parents, probs, strict=True), strict=True))
        for token, parent, prob in list(zip(pruned.tokens, pruned.parents, pruned.probs, strict=True))[1:]:
            assert by_token[token] == (full.tokens.index(pruned.tokens[parent]), prob)
        best = sorted(probs[1:], reverse=True)[: len(pruned.probs) - 1]
        assert sorted(pruned.probs[1:], reverse=True) == best


def test_check_tree_accepts_what_came_over_the_bus() -> None:
    good = tree(CHAIN)
    check(msgspec.msgpack.decode(msgspec.msgpack.encode(good), type=DraftTree))
