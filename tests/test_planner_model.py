"""The model drafter: its candidates are the draft model's own likeliest, in bounded memory, whatever the target decided."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from common.config import ConfigError
from kernels import ops
from services.planner import model as subject
from services.planner.actor import make_planner
from services.planner.beams import MAX_CHILDREN
from services.planner.config import PlannerConfig
from services.planner.draft_model import DraftModel
from services.planner.drafter import DraftOrder, Key, Pool
from services.planner.model import PAGE_SIZE, ModelDrafter
from tests.draft_folders import model_folder, near_model_folder
from tests.test_lossless_modes import run_with_planner
from tests.tiny import NUM_TOKENS, SHAPE, Driver, all_requests, random_prompt, tiny_engine, tiny_pair, truth

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
SLOT_BYTES = 2 * 4 * 2 * 2 * 8
"""Keys and values, in float32, of two layers with two heads of 8."""


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "has_fast_bfloat16", lambda: False)


@pytest.fixture(autouse=True)
def whatever_it_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is never sure of anything; and prompts are read at once, but where a test says otherwise."""
    monkeypatch.setattr(subject, "MIN_GAIN", 0.0)
    monkeypatch.setattr(subject, "MAX_ROWS", 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("tiny") / "model")


def drafter_of(folder: Path, num_slots: int = 40_000) -> ModelDrafter:
    return ModelDrafter(DraftModel(folder, kv_bytes=num_slots * SLOT_BYTES), min_prob=1e-7)


def key(name: str) -> Key:
    return ("executor", name)


def paths(pool: Pool) -> dict[tuple[int, ...], float]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(pool.tokens, pool.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    assert len(set(found)) == len(found)
    return dict(zip(found, pool.probs, strict=True))


@torch.inference_mode()
def by_brute_force(model: Any, tokens: Sequence[int], depth: int, width: int) -> dict[tuple[int, ...], float]:
    """The likeliest children of the likeliest paths, each path computed anew by transformers."""
    found: dict[tuple[int, ...], float] = {}
    beams: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(depth):
        children = {}
        for path, above in beams.items():
            probs_V = model(torch.tensor([[*tokens, *path]])).logits[0, -1].softmax(-1)
            for prob, token in zip(*(top.tolist() for top in probs_V.topk(MAX_CHILDREN)), strict=True):
                children[(*path, token)] = above * min(prob, math.exp(-1e-3))
        found |= children
        beams = dict(sorted(children.items(), key=lambda item: -item[1])[:width])
    return {path: prob for path, prob in found.items() if prob >= 1e-7}


def check(pool: Pool, model: Any, tokens: Sequence[int], depth: int, width: int) -> None:
    expected = by_brute_force(model, tokens, depth, width)
    assert paths(pool) == pytest.approx(expected, rel=1e-3)
    assert pool.parents == sorted(pool.parents)
    assert all(pool.depths[i] == len(path) for i, path in enumerate(paths(pool)))


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_are_those_of_brute_force_whatever_was_accepted(family: str, tmp_path: Path) -> None:
    """Three sequences of different lengths and depths in one draft; then one goes on as drafted, one otherwise, one is new."""
    overrides = {"sliding_window": 5} if family == "mistral" else {}
    model, _ = tiny_pair(family, **overrides)
    model.save_pretrained(tmp_path)
    ours = drafter_of(tmp_path)
    texts = {name: list(random_prompt(size, seed=size)) for name, size in (("a", 1), ("b", 17), ("c", 40))}
    for name, text in texts.items():
        ours.open(key(name), text)
    depths = {"a": 3, "b": 2, "c": 1}
    for turn in range(3):
        pools = ours.draft([DraftOrder(key(name), depth, 2) for name, depth in depths.items()])
        for (name, depth), pool in zip(depths.items(), pools, strict=True):
            check(pool, model, texts[name], depth, 2)
        drafted = max(paths(pools[0]).items(), key=lambda item: (len(item[0]), item[1]))[0]
        for name, new in (("a", [*drafted, 5]), ("b", [3, 3, 9])) if turn == 0 else ():
            ours.extend(key(name), new)
            texts[name] += new
        if turn == 0:
            texts["c"] = list(random_prompt(9, seed=1))
            ours.open(key("c"), texts["c"])


def test_only_new_tokens_are_read_again(folder: Path) -> None:
    ours = drafter_of(folder)
    ours.open(key("a"), random_prompt(30))
    for new, expected in (((), 30), ((), 31), ((1, 2, 3), 34)):
        ours.extend(key("a"), new)
        ours.draft([DraftOrder(key("a"), 2, 2)])
        assert ours.counters["rows_read"] == expected


@pytest.mark.parametrize("num_done", [0, 1])
def test_a_pass_that_fails_costs_its_own_drafts_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, num_done: int) -> None:
    """Memory runs out while tokens are read, or one level later: pages come back, and what was not read is read again."""
    orders, log_probs, passes = [DraftOrder(key("a"), 4, 2)], DraftModel.log_probs, itertools.count()

    def failing(*arguments: Any) -> torch.Tensor:
        if next(passes) == num_done:
            raise RuntimeError("can't allocate memory")
        return log_probs(*arguments)

    ours, other = drafter_of(folder), drafter_of(folder)
    for each in (ours, other):
        each.open(key("a"), random_prompt(30))
    with monkeypatch.context() as patched:
        patched.setattr(DraftModel, "log_probs", failing)
        with pytest.raises(RuntimeError, match="memory"):
            ours.draft(orders)
    assert ours.num_pages_in_use == 2
    assert paths(ours.draft(orders)[0]) == pytest.approx(paths(other.draft(orders)[0]), rel=1e-3)


def test_all_orders_of_a_report_share_a_pass_per_level(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, passes, log_probs = drafter_of(folder), list[int](), DraftModel.log_probs

    def counted(model: DraftModel, tokens: Sequence[int], *rest: Any) -> torch.Tensor:
        passes.append(len(tokens))
        return log_probs(model, tokens, *rest)

    monkeypatch.setattr(DraftModel, "log_probs", counted)
    for i in range(5):
        ours.open(key(str(i)), random_prompt(3 + i))
    ours.draft([DraftOrder(key(str(i)), 4, 2) for i in range(5)])
    assert passes == [3 + 4 + 5 + 6 + 7, 10, 10, 10]


@pytest.mark.parametrize("seed", range(3))
def test_memory_is_bounded_and_what_was_forgotten_is_read_again(folder: Path, seed: int) -> None:
    """16 pages for twelve sequences of up to five pages, drafted for a few at a time."""
    rng, (model, _) = random.Random(seed), tiny_pair()
    ours = drafter_of(folder, num_slots=16 * PAGE_SIZE)
    texts = {str(i): list(random_prompt(rng.randint(1, 70), seed=i)) for i in range(12)}
    for name, text in texts.items():
        ours.open(key(name), text)
    num_drafted = 0
    for _ in range(25):
        names = rng.sample(sorted(texts), 3)
        pools = ours.draft([DraftOrder(key(name), 2, 2) for name in names])
        assert ours.num_pages_in_use <= 16
        pages = [page for followed in ours._followed.values() for page in followed.pages] + ours._free
        assert sorted(pages) == list(range(16)), "a page was lost, or is held twice"
        for name, pool in zip(names, pools, strict=True):
            if len(pool):
                check(pool, model, texts[name], 2, 2)
                num_drafted += 1
            new = [rng.randrange(97) for _ in range(rng.randint(0, 3))]
            ours.extend(key(name), new)
            texts[name] += new
    assert num_drafted > 50
    assert ours.counters["evictions"] > 5
    for name in texts:
        ours.close(key(name))
    assert ours.num_pages_in_use == 0


def test_a_sequence_larger_than_the_pool_evicts_nobody(folder: Path) -> None:
    ours = drafter_of(folder, num_slots=256)
    ours.open(key("small"), random_prompt(20))
    assert len(ours.draft([DraftOrder(key("small"), 2, 2)])[0]) > 0
    ours.open(key("large"), random_prompt(250))
    assert len(ours.draft([DraftOrder(key("large"), 4, 3)])[0]) == 0
    assert (ours.counters["evictions"], ours.counters["sequences_without_room"]) == (0, 1)


def test_a_long_prompt_is_read_in_parts_and_holds_nobody_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "MAX_ROWS", 32)
    model, _ = tiny_pair()
    ours = drafter_of(folder)
    texts = {"long": random_prompt(90), "short": random_prompt(6, seed=2)}
    for name, text in texts.items():
        ours.open(key(name), text)
    orders = [DraftOrder(key(name), 2, 2) for name in texts]
    sizes = []
    for _ in range(5):
        long, short = ours.draft(orders)
        check(short, model, texts["short"], 2, 2)
        sizes.append(len(long) > 0)
    assert sizes == [False, False, False, True, True], "26, 31, 31 and 2 rows beside the short one's"
    check(long, model, texts["long"], 2, 2)


def test_what_the_draft_model_cannot_hold_has_no_candidates(folder: Path) -> None:
    ours = drafter_of(folder)
    ours.open(key("foreign"), [1, 2, 97])
    ours.open(key("negative"), [1, -2])
    ours.open(key("long"), random_prompt(SHAPE["max_position_embeddings"] - 3))
    ours.open(key("good"), [1, 2])
    orders = [DraftOrder(key(name), 4, 2) for name in ("foreign", "negative", "long", "good")]
    assert [len(pool) > 0 for pool in ours.draft(orders)] == [False, False, False, True]
    assert len(ours.draft([DraftOrder(key("long"), 3, 2)])[0]) > 0
    ours.close(key("good"))
    ours.close(key("good"))
    with pytest.raises(KeyError):
        ours.draft([DraftOrder(key("good"), 1, 1)])


def test_a_draft_model_that_is_the_target_is_right_at_every_depth(folder: Path) -> None:
    engine = tiny_engine(tiny_pair()[1])
    planner = make_planner(PlannerConfig(mode="chain:3", draft=f"model:{folder}", model_dir=str(folder), min_prob=1e-6))
    driver = Driver(engine)
    for request in all_requests():
        assert engine.submit(request, None) is None
    assert run_with_planner(driver, planner) == truth()
    steps = [step for iteration in driver.iterations for step in iteration.progress if step.num_drafted]
    assert [step.accepted_len for step in steps] == [step.num_drafted for step in steps]
    most = [step for step in steps if step.num_drafted == 3]
    assert len(most) >= 4 * ((NUM_TOKENS - 1) // 4)


# --- folders that are refused ----------------------------------------------------------------------------------------


def with_tokenizer(folder: Path, words: Sequence[str]) -> Path:
    vocab = {word: i for i, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
    return folder


def refused(draft: Path, target: Path | str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as found:
        make_planner(PlannerConfig(draft=f"ngram,model:{draft}", model_dir=str(target), **settings))
    return str(found.value)


def test_another_vocabulary_is_refused_and_one_that_is_only_padded_is_not(folder: Path, tmp_path: Path) -> None:
    smaller = near_model_folder(tmp_path / "smaller", vocab_size=90)
    assert "vocab_size 90, not 97" in refused(smaller, folder)
    target = model_folder(tmp_path / "target")
    words = [f"w{i}" for i in range(90)]
    with_tokenizer(target, words)
    with_tokenizer(smaller, [*words[:7], "other", *words[8:]])
    assert "token 7" in refused(smaller, target)
    with_tokenizer(smaller, words)
    make_planner(PlannerConfig(draft=f"model:{smaller}", model_dir=str(target)))


def test_folders_without_a_usable_model_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    assert "model_dir" in refused(folder, "")
    assert f"model:{tmp_path / 'nowhere'}" in refused(tmp_path / "nowhere", folder)
    broken = model_folder(tmp_path / "broken")
    weights = broken / "model.safetensors"
    stored = load_file(weights)
    save_file({name: value for name, value in stored.items() if "layers.1.mlp.up" not in name}, weights, {"format": "pt"})
    assert "no weights for model.layers.1.mlp.up_proj.weight" in refused(broken, folder)
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert str(broken) in refused(broken, folder)
    weights.unlink()
    assert str(broken) in refused(broken, folder)
    assert "draft_kv_bytes must be at least" in refused(folder, folder, draft_kv_bytes=1000)


def test_attention_that_is_not_computed_here_is_refused(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(**SHAPE, head_dim=8, attn_logit_softcapping=30.0)
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="softcap"):
        DraftModel(tmp_path, kv_bytes=2**24)
