"""The create body: defaults, ranges, and errors that name the parameter."""

from __future__ import annotations

import math
from typing import Any

import pytest

from common.messages import LoraSpec
from services.trainer.spec import ApiError, job_hyperparameters, job_lora, parse_create

BODY = {"model": "base", "training_file": "file-1"}


def test_a_bare_body_gets_the_documented_defaults() -> None:
    spec = parse_create(dict(BODY), new_seed=11)
    assert (spec.model, spec.training_file, spec.seed, spec.suffix, spec.metadata) == ("base", "file-1", 11, None, None)
    assert job_hyperparameters(spec) == {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert job_lora(spec) == {
        "method": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.0, "learning_rate": 2e-4, "optimizer": "adamw",
        "momentum": 0.0, "scheduler": "linear", "warmup_steps": 0, "max_grad_norm": 1.0, "weight_decay": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    assert spec.learning_rate == 2e-4


def test_everything_can_be_asked_for() -> None:
    asked: dict[str, Any] = {
        **BODY, "suffix": "my-model_1.0", "seed": 5, "metadata": {"team": "a"}, "integrations": [], "validation_file": "file-2",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {
            "n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 2}}},
        "lora": {"method": "rslora", "dropout": 0.1, "optimizer": "sgd", "momentum": 0.9,
                 "rank": 8, "alpha": 16, "target_modules": ["v_proj", "q_proj", "q_proj"], "learning_rate": 1e-3,
                 "scheduler": "cosine", "warmup_steps": 3, "max_grad_norm": 0, "weight_decay": 0.01},
    }  # fmt: skip
    spec = parse_create(asked, new_seed=11)
    assert spec.lora == LoraSpec(rank=8, alpha=16.0, target_modules=("q_proj", "v_proj"), use_rslora=True, dropout=0.1)
    assert (spec.optimizer, spec.momentum) == ("sgd", 0.9)
    assert (spec.seed, spec.n_epochs, spec.batch_size, spec.learning_rate) == (5, 2, 4, 2e-3)
    assert (spec.scheduler, spec.warmup_steps, spec.max_grad_norm, spec.weight_decay) == ("cosine", 3, 0.0, 0.01)
    assert spec.validation_file == "file-2"
    assert parse_create({**BODY, "suffix": "Mine, too"}, 0).suffix == "Mine, too"
    assert (spec.suffix, spec.metadata) == ("my-model_1.0", {"team": "a"})


def test_the_deprecated_place_of_hyperparameters_and_auto_work() -> None:
    spec = parse_create({**BODY, "hyperparameters": {"n_epochs": 7, "batch_size": 2, "learning_rate_multiplier": "auto"}}, 0)
    assert (spec.n_epochs, spec.batch_size, spec.learning_rate_multiplier) == (7, 2, 1.0)
    assert parse_create({**BODY, "lora": {"target_modules": "all-linear"}}, 0).lora == LoraSpec()


def test_ia3_has_vectors_in_place_of_ranks() -> None:
    usual = parse_create({**BODY, "lora": {"method": "ia3"}}, 0)
    targets = ("k_proj", "v_proj", "down_proj")
    assert usual.lora == LoraSpec(method="ia3", target_modules=targets, feedforward_modules=("down_proj",))
    assert usual.learning_rate == 3e-3
    shown = job_lora(usual)
    assert (shown["method"], shown["feedforward_modules"]) == ("ia3", ["down_proj"])
    assert not {"rank", "alpha", "dropout"} & shown.keys()
    asked = {"method": "ia3", "target_modules": ["o_proj", "q_proj"], "feedforward_modules": ["o_proj"], "learning_rate": 0.1}
    spec = parse_create({**BODY, "lora": asked}, 0)
    assert spec.lora == LoraSpec(method="ia3", target_modules=("q_proj", "o_proj"), feedforward_modules=("o_proj",))
    assert parse_create({**BODY, "lora": {"method": "ia3", "target_modules": ["q_proj"]}}, 0).lora.feedforward_modules == ()
    assert len(parse_create({**BODY, "lora": {"method": "ia3", "target_modules": "all-linear"}}, 0).lora.target_modules) == 7


def test_a_bottleneck_has_a_rank_and_a_non_linearity() -> None:
    usual = parse_create({**BODY, "lora": {"method": "bottleneck"}}, 0)
    assert usual.lora == LoraSpec(method="bottleneck", non_linearity="relu", target_modules=("o_proj", "down_proj"))
    shown = job_lora(usual)
    assert (shown["method"], shown["rank"], shown["non_linearity"], "alpha" in shown) == ("bottleneck", 16, "relu", False)
    asked = {"method": "bottleneck", "rank": 64, "non_linearity": "gelu", "target_modules": ["down_proj"], "dropout": 0.1}
    spec = parse_create({**BODY, "lora": asked}, 0)
    wanted = LoraSpec(method="bottleneck", rank=64, non_linearity="gelu", target_modules=("down_proj",), dropout=0.1)
    assert spec.lora == wanted


def nested(**hyperparameters: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": 3}, "model"),
        ({"model": ""}, "model"),
        ({"training_file": None}, "training_file"),
        ({"validation_file": ""}, "validation_file"),
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"learning_rate": 1}, "learning_rate"),
        (nested(n_epochs=0), "method.supervised.hyperparameters.n_epochs"),
        (nested(n_epochs=51), "method.supervised.hyperparameters.n_epochs"),
        (nested(batch_size=257), "method.supervised.hyperparameters.batch_size"),
        (nested(batch_size=True), "method.supervised.hyperparameters.batch_size"),
        (nested(learning_rate_multiplier=0), "method.supervised.hyperparameters.learning_rate_multiplier"),
        (nested(learning_rate_multiplier="fast"), "method.supervised.hyperparameters.learning_rate_multiplier"),
        (nested() | {"hyperparameters": {}}, "hyperparameters"),
        ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs"),
        ({"lora": {"r": 8}}, "lora.r"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"rank": 257}}, "lora.rank"),
        ({"lora": {"alpha": 0}}, "lora.alpha"),
        ({"lora": {"alpha": math.nan}}, "lora.alpha"),
        ({"lora": {"learning_rate": 0}}, "lora.learning_rate"),
        ({"lora": {"learning_rate": math.inf}}, "lora.learning_rate"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
        ({"lora": {"target_modules": ["lm_head"]}}, "lora.target_modules[0]"),
        ({"lora": {"target_modules": "some"}}, "lora.target_modules"),
        ({"lora": {"scheduler": "step"}}, "lora.scheduler"),
        ({"lora": {"method": "dora"}}, "lora.method"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout"),
        ({"lora": {"method": "ia3", "rank": 8}}, "lora.rank"),
        ({"lora": {"method": "ia3", "alpha": 8}}, "lora.alpha"),
        ({"lora": {"method": "ia3", "dropout": 0}}, "lora.dropout"),
        ({"lora": {"method": "ia3", "feedforward_modules": ["o_proj"]}}, "lora.feedforward_modules"),
        ({"lora": {"method": "ia3", "feedforward_modules": ["q_proj"]}}, "lora.feedforward_modules[0]"),
        ({"lora": {"feedforward_modules": ["down_proj"]}}, "lora.feedforward_modules"),
        ({"lora": {"method": "bottleneck", "alpha": 8}}, "lora.alpha"),
        ({"lora": {"method": "bottleneck", "non_linearity": "tanh"}}, "lora.non_linearity"),
        ({"lora": {"method": "bottleneck", "target_modules": ["q_proj"]}}, "lora.target_modules"),
        ({"lora": {"method": "bottleneck", "target_modules": "all-linear"}}, "lora.target_modules"),
        ({"lora": {"method": "bottleneck", "feedforward_modules": ["o_proj"]}}, "lora.feedforward_modules"),
        ({"lora": {"non_linearity": "relu"}}, "lora.non_linearity"),
        ({"lora": {"optimizer": "lion"}}, "lora.optimizer"),
        ({"lora": {"momentum": 0.9}}, "lora.momentum"),
        ({"lora": {"warmup_steps": -1}}, "lora.warmup_steps"),
        ({"lora": {"weight_decay": 2}}, "lora.weight_decay"),
        ({"lora": {"max_grad_norm": -1}}, "lora.max_grad_norm"),
    ],
)
def test_a_bad_parameter_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        parse_create({**BODY, **change}, 0)
    assert error.value.reply.status == 400
    assert error.value.reply.param == param
    assert param.split(".")[-1].split("[")[0] in error.value.reply.message


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({"method": {"type": "dpo"}}, "supervised"),
        ({"lora": {"method": "dora"}}, "rslora"),
        ({"lora": {"optimizer": "lion"}}, "adamw"),
        ({"lora": {"target_modules": ["foo_proj"]}}, "gate_proj"),
        ({"lora": {"target_modules": "some"}}, "all-linear"),
    ],
)
def test_what_would_be_valid_is_told(change: dict[str, Any], valid: str) -> None:
    with pytest.raises(ApiError, match=f"valid: .*'{valid}'"):
        parse_create({**BODY, **change}, 0)


@pytest.mark.parametrize("field", ["model", "training_file"])
def test_a_missing_parameter_is_named(field: str) -> None:
    with pytest.raises(ApiError, match=field) as error:
        parse_create({name: value for name, value in BODY.items() if name != field}, 0)
    assert error.value.reply.param == field
