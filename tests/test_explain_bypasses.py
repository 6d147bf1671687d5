"""PEFT configurations become bypasses on the linears that PEFT itself adapts; what is unknown is refused by field."""

from __future__ import annotations

import re
from typing import Any

import peft
import pytest

from common.bypasses import Bypass, BypassError, bypasses_of
from common.model_shape import ModelShape
from tests.helpers import PEFT_WARNING, tiny_model

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)

SHAPE = ModelShape(hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=40, vocab_size=99)
PATH = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.\w+\.(\w+)\.(?:lora_A|ia3_l)\b.*")
LORA_TARGETS: list[dict[str, Any]] = [
    {},
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    {"target_modules": r".*\.(1|2)\.mlp\.(up|gate)_proj"},
    {"target_modules": r".*proj", "exclude_modules": r".*layers\.0.*"},
    {"target_modules": ["self_attn.v_proj", "1.mlp.down_proj", "proj"]},
    {"target_modules": ["k_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["k_proj"], "layers_to_transform": 1, "use_rslora": True},
]
IA3_TARGETS: list[dict[str, Any]] = [
    {},
    {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    {"target_modules": r".*\.2\..*(o|down)_proj", "feedforward_modules": []},
]


def adapted_by_peft(config: Any) -> set[tuple[int, str]]:
    model = peft.get_peft_model(tiny_model(), config)
    matches = (PATH.fullmatch(name) for name, _ in model.named_parameters())
    return {(int(match[1]), match[2]) for match in matches if match}


def adapted_by_us(config: dict[str, Any]) -> set[tuple[int, str]]:
    found = bypasses_of(config, SHAPE)
    return {(layer, target) for layer, bypasses in enumerate(found) for target in bypasses}


@pytest.mark.parametrize("settings", LORA_TARGETS, ids=str)
def test_lora_joins_the_linears_that_peft_adapts(settings: dict[str, Any]) -> None:
    expected = adapted_by_peft(peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    assert adapted_by_us({"peft_type": "LORA"} | settings) == expected != set()


@pytest.mark.parametrize("settings", IA3_TARGETS, ids=str)
def test_ia3_joins_the_linears_that_peft_adapts(settings: dict[str, Any]) -> None:
    expected = adapted_by_peft(peft.IA3Config(task_type="CAUSAL_LM", **settings))
    assert adapted_by_us({"peft_type": "IA3"} | settings) == expected != set()


def test_ia3_scales_the_input_of_feedforward_modules() -> None:
    (first, *_) = bypasses_of({"peft_type": "IA3"}, SHAPE)
    assert {target: bypass.method for target, bypass in first.items()} == {
        "k_proj": "ia3_output", "v_proj": "ia3_output", "down_proj": "ia3_input",
    }  # fmt: skip


def test_a_bottleneck_has_its_size_and_activation() -> None:
    (first, *_) = bypasses_of({"peft_type": "BOTTLENECK", "bottleneck_size": 5, "non_linearity": "relu"}, SHAPE)
    assert first["o_proj"] == Bypass(method="bottleneck", target="o_proj", rank=5, activation="relu")


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, "peft_type"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"peft_type": "LORA", "target_modules": ["c_attn"]}, "target_modules"),
        ({"peft_type": "LORA", "target_modules": "*"}, "target_modules"),
        ({"peft_type": "LORA", "target_modules": 7}, "target_modules"),
        ({"peft_type": "LORA", "target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "target_modules"),
        ({"peft_type": "LORA", "layers_to_transform": [3]}, "layers_to_transform"),
        ({"peft_type": "LORA", "r": 0}, "r"),
        ({"peft_type": "LORA", "r": True}, "r"),
        ({"peft_type": "LORA", "use_dora": True}, "use_dora"),
        ({"peft_type": "BOTTLENECK", "non_linearity": "sine"}, "non_linearity"),
        ({"peft_type": "BOTTLENECK", "use_parallel_adapter": True}, "use_parallel_adapter"),
    ],
    ids=str,
)
def test_what_is_unknown_is_refused_by_field(config: dict[str, Any], field: str) -> None:
    with pytest.raises(BypassError, match=rf"^{field}: ") as caught:
        bypasses_of(config, SHAPE)
    assert "\n" not in str(caught.value)
