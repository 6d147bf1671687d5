"""The decoder's logits against transformers, for every way in which tokens can come into a batch; loading of folders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.executor.batch import Segment, ancestor_mask, build_batch
from services.executor.loader import choose_dtype, load_decoder
from services.executor.model import Decoder, KvCache
from services.executor.model_config import UnsupportedModelError, read_model_config
from services.executor.verify import depths
from tests.helpers import CPU, as_decoder, new_cache, tiny_model
from tests.tiny import SHAPE, random_prompt, tiny_pair

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


FAMILIES: dict[str, Callable[[], tuple[Any, Decoder]]] = {
    "tied": lambda: tiny_pair(tie_word_embeddings=True),
    "untied": lambda: tiny_pair(tie_word_embeddings=False),
    "qwen2 with biases": lambda: tiny_pair("qwen2"),
    "one kv head": lambda: tiny_pair(num_key_value_heads=1, num_hidden_layers=3),
    "as many kv heads": lambda: tiny_pair(num_key_value_heads=4),
    "wide heads": lambda: tiny_pair(head_dim=20),
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


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model."""
    tiny_model(**SHAPE).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | fields))


def test_sharded_safetensors(tmp_path: Path) -> None:
    model = tiny_model(**SHAPE)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = random_prompt(11)
    decoder = load_decoder(tmp_path, torch.float32, CPU)
    assert_logits(forward(decoder, new_cache(decoder), run(tokens, 0, 11, list(range(11))))[0], oracle(model, tokens))


def test_half_precision_checkpoints_are_widened(tmp_path: Path) -> None:
    model = tiny_model(**SHAPE).bfloat16()
    decoder = as_decoder(model, tmp_path, torch.float32)
    assert decoder.dtype == torch.float32
    assert read_model_config(tmp_path).torch_dtype == "bfloat16"
    tokens = random_prompt(11)
    logits = forward(decoder, new_cache(decoder), run(tokens, 0, 11, list(range(11))))[0]
    assert_logits(logits, oracle(type(model).from_pretrained(tmp_path, dtype=torch.float32), tokens))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures: GPT2LMHeadModel"),
        ({"architectures": []}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope type llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type linear"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, "sliding_window"),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "use_sliding_window": True}, "sliding_window"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"vocab_size": [97]}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_parameters": 7}, "rope"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_configurations_that_cannot_run_are_refused_by_field(folder: Path, fields: dict[str, Any], named: str) -> None:
    edit(folder / "config.json", **fields)
    with pytest.raises(UnsupportedModelError, match=named):
        load_decoder(folder, torch.float32, CPU)


@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ],
)
def test_a_missing_field_is_named(folder: Path, field: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    del content[field]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match=field):
        read_model_config(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"config"'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_unreadable_json_is_refused_by_file(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UnsupportedModelError, match=name):
        read_model_config(folder)


def test_missing_files_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=r"no model\.safetensors"):
        load_decoder(folder, torch.float32, CPU)
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        load_decoder(tmp_path / "nowhere", torch.float32, CPU)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]"])
def test_an_unreadable_index_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match="index"):
        load_decoder(folder, torch.float32, CPU)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_model(**SHAPE).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UnsupportedModelError, match=shard.name):
        load_decoder(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors is not a readable"):
        load_decoder(folder, torch.float32, CPU)


@pytest.mark.parametrize(
    ("fields", "tensor"),
    [
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is missing"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight is missing"),
        ({"vocab_size": 98}, r"model\.embed_tokens\.weight has shape \(97, 32\), expected \(98, 32\)"),
        ({"intermediate_size": 44}, r"gate_proj\.weight has shape \(48, 32\), expected \(44, 32\)"),
        ({"num_key_value_heads": 1}, r"k_proj\.weight has shape \(16, 32\), expected \(8, 32\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_tensor(folder: Path, fields: dict[str, Any], tensor: str) -> None:
    edit(folder / "config.json", **fields)
    with pytest.raises(UnsupportedModelError, match=tensor):
        load_decoder(folder, torch.float32, CPU)


def test_end_tokens_come_from_both_files(folder: Path) -> None:
    assert read_model_config(folder).eos_token_ids == ()
    edit(folder / "config.json", eos_token_id=2)
    edit(folder / "generation_config.json", eos_token_id=[5, 2])
    assert read_model_config(folder).eos_token_ids == (2, 5)


def test_the_type_is_the_checkpoints_where_the_device_computes_in_it(folder: Path) -> None:
    config = read_model_config(folder)
    assert choose_dtype("auto", config, CPU) == torch.float32
    assert choose_dtype("bfloat16", config, CPU) == torch.bfloat16
    assert choose_dtype("auto", config, torch.device("cuda")) == torch.float32
    with pytest.raises(ValueError, match="float8"):
        choose_dtype("float8", config, CPU)
