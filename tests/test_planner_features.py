"""The features drafter: its head computes what was trained, all candidates are in its pools, rows may be missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from common.config import ConfigError
from kernels import ops
from kernels.drafting.files import write_drafter
from kernels.drafting.head import DraftHead, HeadShape, Span
from services.planner.drafter import DraftOrder, Pool
from services.planner.features import FeaturesDrafter
from services.planner.features_head import FeaturesHead

SHAPE = HeadShape(
    hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=16, feature_layers=(1, 3), window=6,
    rope_theta=1000.0, rms_norm_eps=1e-5,
)  # fmt: skip
VOCABULARY = tuple(range(3, 60, 3))
OTHER = len(VOCABULARY)
WIDTH = SHAPE.hidden_size * len(SHAPE.feature_layers)
MAX_DEPTH = 4


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "has_fast_bfloat16", lambda: False)


@pytest.fixture(scope="module")
def trained() -> DraftHead:
    generator = torch.Generator().manual_seed(1)
    head = DraftHead(SHAPE, torch.randn(OTHER + 1, SHAPE.hidden_size, generator=generator))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim == 2 else 0.2))
            if parameter.ndim == 1:
                parameter.add_(1.0)
            else:  # what int8 holds exactly
                parameter.copy_((parameter * 100).round().clamp(-127, 127) / 100)
                parameter[:, 0] = 1.27
        head.head_VH.mul_(0.4)
    return head


@pytest.fixture(scope="module")
def folder(trained: DraftHead, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafter")
    write_drafter(path, trained, VOCABULARY, fingerprint="f" * 16, max_depth=MAX_DEPTH)
    return path


@pytest.fixture
def drafter(folder: Path) -> FeaturesDrafter:
    return FeaturesDrafter(FeaturesHead(folder), min_prob=1e-6, min_gain=0.0)


def random_rows(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def as_bytes(rows: torch.Tensor) -> bytes:
    data: bytes = rows.view(torch.int16).numpy().tobytes()
    return data


def place(token: int) -> int:
    return VOCABULARY.index(token) if token in VOCABULARY else OTHER


@torch.inference_mode()
def path_probs(head: DraftHead, rows: torch.Tensor, tokens: Sequence[int], path: Sequence[int]) -> list[float]:
    """What the trained head thinks of each token of a path that goes on behind `tokens`; `rows` are of all but the last."""
    places = torch.tensor([place(token) for token in (*tokens, *path, 0)])
    following = torch.stack([places[i + 1 : i + 1 + len(path)] for i in range(len(tokens) - 1)])
    span = Span(0, len(rows), torch.tensor([len(rows) - 1]))
    outs = head.unroll(rows.float(), following, [span], len(path))
    return [head.logits(out).softmax(-1)[0, place(token)].item() for out, token in zip(outs, path, strict=True)]


def paths(pool: Pool) -> Iterator[tuple[list[int], list[float]]]:
    """Of each node the tokens and path probabilities from the root on."""
    for node in range(len(pool)):
        tokens, probs = list[int](), list[float]()
        while node >= 0:
            tokens.insert(0, pool.tokens[node])
            probs.insert(0, pool.probs[node])
            node = pool.parents[node]
        yield tokens, probs


def check(pool: Pool, head: DraftHead, rows: torch.Tensor, tokens: Sequence[int], *, depth: int) -> None:
    assert max(pool.depths, default=0) == depth
    assert pool.parents == sorted(pool.parents)
    assert len(set(zip(pool.parents, pool.tokens, strict=True))) == len(pool)
    for path, probs in paths(pool):
        expected = path_probs(head, rows, tokens, path)
        assert probs[-1] == pytest.approx(math.prod(expected), rel=0.02)


TOKENS = [6, 9, 1, 12, 57, 4, 30, 33, 3, 18, 21]


@pytest.mark.parametrize("num_tokens", [2, 5, 11], ids=["one row", "few rows", "more than the window"])
def test_every_candidate_is_as_probable_as_the_trained_head_says(
    drafter: FeaturesDrafter, trained: DraftHead, num_tokens: int
) -> None:
    tokens, rows = TOKENS[:num_tokens], random_rows(num_tokens - 1)
    drafter.open(("e", "r"), tokens, features=as_bytes(rows[-SHAPE.window :]))
    (pool,) = drafter.draft([DraftOrder(("e", "r"), MAX_DEPTH, 3)])
    check(pool, trained, rows, tokens, depth=MAX_DEPTH)
    assert pool.depths.count(1) > 3, "all children are candidates"


def test_sequences_are_drafted_together_and_extended(drafter: FeaturesDrafter, trained: DraftHead) -> None:
    rows = {name: random_rows(len(TOKENS) + 3, seed) for seed, name in enumerate("abc")}
    for name, num_tokens in zip("abc", (3, 9, 6), strict=True):
        drafter.open(("e", name), TOKENS[:num_tokens], features=as_bytes(rows[name][: num_tokens - 1][-SHAPE.window :]))
    drafter.draft([DraftOrder(("e", name), 2, 2) for name in "abc"])
    drafter.extend(("e", "b"), [33, 36], features=as_bytes(rows["b"][8:10]))
    drafter.close(("e", "c"))
    drafter.open(("e", "c"), TOKENS[:5], features=as_bytes(rows["c"][:4]))
    pools = drafter.draft([DraftOrder(("e", name), depth, 2) for name, depth in zip("abc", (4, 3, 0), strict=True)])
    check(pools[0], trained, rows["a"][:2], TOKENS[:3], depth=4)
    check(pools[1], trained, rows["b"][:10], [*TOKENS[:9], 33, 36], depth=3)
    assert len(pools[2]) == 0


def test_missing_rows_cost_only_themselves(drafter: FeaturesDrafter, trained: DraftHead) -> None:
    rows, key = random_rows(20), ("e", "r")
    drafter.open(key, TOKENS[:4])
    assert len(drafter.draft([DraftOrder(key, 3, 2)])[0]) == 0
    drafter.extend(key, [3, 6], features=as_bytes(rows[3:5]))
    drafter.extend(key, [9], features=b"odd")
    assert len(drafter.draft([DraftOrder(key, 3, 2)])[0]) == 0
    drafter.extend(key, [12, 15], features=as_bytes(rows[6:8]))
    (pool,) = drafter.draft([DraftOrder(key, 3, 2)])
    tail = [9, 12, 15]  # the rows before the gap are forgotten; only distances between positions matter
    check(pool, trained, rows[6:8], tail, depth=3)
    assert drafter.counters == {"rows_missing": 1}
    drafter.open(key, TOKENS[:4], features=as_bytes(rows[:9]))
    assert drafter.counters["rows_malformed"] == 1
    assert len(drafter.draft([DraftOrder(key, 3, 2)])[0]) == 0


def test_a_folder_that_holds_no_head_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        FeaturesHead(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "another"}')
    (tmp_path / "drafter.safetensors").write_bytes((folder / "drafter.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="another"):
        FeaturesHead(tmp_path)
