"""Bottleneck adapters served: what transformers says with plain modules in it, beside requests of every other kind."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from common.messages import AdapterRecord, LoraSpec
from common.peft_folder import CONFIG, WEIGHTS, PeftFolderError, read_peft_folder
from services.cli import adapters
from services.executor.lora import LoraAdapter
from services.executor.views import Limits
from tests.bottleneck_oracle import inserted, random_bottleneck
from tests.drafts import oracle_draft
from tests.helpers import random_adapter
from tests.test_finetune_ia3 import random_ia3
from tests.tiny import NUM_TOKENS, PROMPTS, Driver, all_requests, greedy, serve, tiny_engine, tiny_pair, truth

BOTH = ("o_proj", "down_proj")
SPECS = {
    "houlsby": LoraSpec(method="bottleneck", rank=6, non_linearity="relu", target_modules=BOTH),
    "pfeiffer": LoraSpec(method="bottleneck", rank=3, non_linearity="gelu", target_modules=("down_proj",)),
}
NAMES = {"r1": "houlsby", "r2": "lora", "r3": "pfeiffer", "r4": "houlsby", "r5": "ia3"}


def all_adapters() -> dict[str, LoraAdapter]:
    decoder = tiny_pair()[1]
    found = {name: random_bottleneck(decoder, spec, seed=i) for i, (name, spec) in enumerate(SPECS.items())}
    ia3 = LoraSpec(method="ia3", target_modules=("k_proj", *BOTH))
    return found | {"lora": random_adapter(decoder, LoraSpec(rank=4, alpha=4.0)), "ia3": random_ia3(decoder, ia3)}


def expected_tokens() -> dict[str, list[int]]:
    """By transformers, of the requests with a bottleneck adapter and of the one without any."""
    tokens = {"r0": truth()["r0"]}
    for name, adapter in all_adapters().items():
        if name in SPECS:
            model = copy.deepcopy(tiny_pair()[0])
            inserted(model, adapter.weights.tensors, adapter.spec)
            tokens |= {key: greedy(model, PROMPTS[key], NUM_TOKENS) for key, chosen in NAMES.items() if chosen == name}
    return tokens


def run(**options: Any) -> Driver:
    engine = tiny_engine(tiny_pair()[1], num_pages=256, **options.pop("engine", {}))
    engine.adapters.update(all_adapters())
    return serve(tiny_pair()[1], *all_requests(), adapters=NAMES, engine=engine, **options)


def test_answers_are_transformers_in_decode_chunks_and_trees() -> None:
    expected = expected_tokens()
    assert all(expected[name] != truth()[name] for name in expected if name in NAMES)
    plain = run().streams.tokens
    assert {name: plain[name] for name in expected} == expected
    chunked = run(engine={"limits": Limits(max_batch_tokens=7, min_prefill_tokens=3)})
    assert chunked.streams.tokens == plain
    drafted = run(draft=oracle_draft(dict(plain), 1))
    assert drafted.engine.counters["accepted_tokens"] > 30
    assert drafted.streams.tokens == plain


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_folders_go_out_and_come_back(spec: LoraSpec, tmp_path: Path) -> None:
    """In the words of LLM-Adapters, whose tensors have these names: its folders of serial adapters behind down_proj look so."""
    decoder = tiny_pair()[1]
    adapter = random_bottleneck(decoder, spec)
    record = AdapterRecord(name="mine", base_model="tiny", artifact="a", lora=spec, created_at=0.0)
    adapters.write_folder(tmp_path / "mine", record, adapter.to_safetensors())
    config = json.loads((tmp_path / "mine" / CONFIG).read_text())
    assert (config["peft_type"], config["bottleneck_size"], config["non_linearity"]) == (
        "BOTTLENECK",
        spec.rank,
        spec.non_linearity,
    )
    assert "heddle adapters import" in (tmp_path / "mine" / "README.md").read_text()
    found = read_peft_folder(tmp_path / "mine")
    assert found.lora == spec
    again = LoraAdapter.from_safetensors("again", found.lora, found.weights, decoder.config)
    assert torch.equal(again.weights.flat, adapter.weights.flat)
    names = set(safetensors.torch.load(found.weights))
    assert "base_model.model.model.layers.1.mlp.down_proj.adapter_down.weight" in names
    assert adapters.kind_of(spec) == f"bottleneck {spec.rank}"


@pytest.mark.parametrize(
    ("changes", "tensors", "reason"),
    [
        ({"bottleneck_size": 7}, {}, "bottleneck_size is 7"),
        ({"bottleneck_size": 1.5}, {}, "bottleneck_size must be a whole number"),
        ({"non_linearity": "tanh"}, {}, "non_linearity must be relu or gelu, not 'tanh'"),
        ({"scaling": "learned"}, {}, "scaling must be 1, not 'learned'"),
        ({"use_parallel_adapter": True}, {}, "use_parallel_adapter is not supported"),
        ({}, {"self_attn.q_proj": (6, 32)}, "behind q_proj is not supported, only o_proj, down_proj"),
        ({}, {"mlp.down_proj": None}, "lacks a matrix of down_proj in layer 0"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    changes: dict[str, Any], tensors: dict[str, tuple[int, int] | None], reason: str, tmp_path: Path
) -> None:
    spec, decoder = SPECS["houlsby"], tiny_pair()[1]
    record = AdapterRecord(name="mine", base_model="tiny", artifact="a", lora=spec, created_at=0.0)
    config = adapters.peft_config(record) | changes
    weights = dict(random_bottleneck(decoder, spec).weights.tensors)
    for path, shape in tensors.items():
        for layer in range(2):
            key = f"base_model.model.model.layers.{layer}.{path}.adapter_down.weight"
            if shape is None:
                del weights[key]
            else:
                weights[key] = torch.ones(shape)
                weights[key.replace("_down.", "_up.")] = torch.ones(shape).mT
    (tmp_path / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / WEIGHTS)
    with pytest.raises(PeftFolderError, match=reason):
        read_peft_folder(tmp_path)
