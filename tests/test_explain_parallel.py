"""Dependent parallelization: every plan computes the bypass, on simulated ranks; costs are FlexLLM's; the cheapest wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.bypasses import Bypass, Method
from common.model_shape import ModelShape
from common.parallel_plan import Machine, ParallelPlan, bypass_steps, candidate_plans, surroundings
from common.tensor_states import ELEMENTWISE_RULES, LINEAR_RULES, Rule, State
from services.cli.__main__ import main

RANKS, NUM_TOKENS, BYTES = 4, 16, 2
SHAPE = ModelShape(hidden_size=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4, intermediate_size=64, vocab_size=99)
IN, OUT, RANK = 32, 64, 8
MACHINE = Machine(num_ranks=RANKS)
BYPASSES: list[tuple[Method, str]] = [
    ("lora", "up_proj"), ("lora", "q_proj"), ("lora", "down_proj"), ("bottleneck", "o_proj"), ("bottleneck", "up_proj"),
    ("ia3_output", "k_proj"), ("ia3_input", "down_proj"), ("ia3_output", "o_proj"),
]  # fmt: skip
Ranks = list[Tensor]


def plans_of(method: Method, target: str) -> list[ParallelPlan]:
    return candidate_plans(bypass_of(method, target), SHAPE, MACHINE, NUM_TOKENS, BYTES)


def bypass_of(method: Method, target: str) -> Bypass:
    return Bypass(method=method, target=target, rank=RANK, activation="relu")


def split(whole: Tensor, state: State) -> Ranks:
    """What each rank has of a tensor [tokens, features] in this state."""
    match state:
        case State.REPLICATED:
            return [whole.clone() for _ in range(RANKS)]
        case State.TOKENS:
            return list(whole.chunk(RANKS, dim=0))
        case State.FEATURES:
            return list(whole.chunk(RANKS, dim=1))
        case State.PARTIAL:
            shares = [torch.randn_like(whole) for _ in range(RANKS - 1)]
            return [*shares, whole - sum(shares)]


def whole_of(ranks: Ranks, state: State) -> Tensor:
    match state:
        case State.REPLICATED:
            assert all(torch.equal(rank, ranks[0]) for rank in ranks)
            return ranks[0]
        case State.TOKENS:
            return torch.cat(ranks, dim=0)
        case State.FEATURES:
            return torch.cat(ranks, dim=1)
        case State.PARTIAL:
            return torch.stack(ranks).sum(dim=0)


def run_step(ranks: Ranks, rule: Rule, weight: Tensor | None) -> Ranks:
    """Each rank's part of a linear's weight [out, in], or of the scale's [features], on its part of the input; None is ReLU."""
    if weight is None:
        return [x_TI.relu() for x_TI in ranks]
    if weight.ndim == 1:
        parts = weight.chunk(RANKS) if rule.splits_weight else [weight] * RANKS
        return [x_TI * part_I for x_TI, part_I in zip(ranks, parts, strict=True)]
    dims = {"[=,-,-]": None, "[-,|,-]": 0, "[-,-,|]": 1}
    dim = dims[rule.weight]
    matrices = [weight] * RANKS if dim is None else weight.chunk(RANKS, dim=dim)
    return [x_TI @ part_OI.T for x_TI, part_OI in zip(ranks, matrices, strict=True)]


@pytest.mark.parametrize(("method", "target"), BYPASSES)
def test_every_plan_computes_the_bypass(method: Method, target: str) -> None:
    torch.manual_seed(0)
    steps, around = bypass_steps(bypass_of(method, target), SHAPE), surroundings(bypass_of(method, target))
    weights: list[Tensor | None] = []
    for step in steps:
        shape = (step.num_out, step.num_in) if step.is_linear else (step.num_out,)
        weights.append(torch.randn(shape, dtype=torch.float64) if step.num_weights else None)
    x_TI = torch.randn(NUM_TOKENS, steps[0].num_in, dtype=torch.float64)
    expected = x_TI
    for weight in weights:
        expected = expected.relu() if weight is None else expected * weight if weight.ndim == 1 else expected @ weight.T
    plans = plans_of(method, target)
    assert plans
    for plan in plans:
        state, ranks = around.source, split(x_TI, around.source)
        rules = [
            (LINEAR_RULES if step.is_linear else ELEMENTWISE_RULES)[n - 1] for step, n in zip(steps, plan.rules, strict=True)
        ]
        for rule, weight in zip(rules, weights, strict=True):
            ranks = split(whole_of(ranks, state), rule.source) if state is not rule.source else ranks
            ranks, state = run_step(ranks, rule, weight), rule.output
        torch.testing.assert_close(whole_of(ranks, state), expected, rtol=1e-9, atol=1e-9)
        assert (state is around.target) == (plan.operators[-1].startswith(steps[-1].name + ":"))


def test_the_four_candidates_of_a_column_parallel_lora() -> None:
    """FlexLLM's figure: what each sends forward, and computes, per rank; the gradient takes the way back."""
    found = {plan.name: plan for plan in plans_of("lora", "up_proj")}
    ring = (RANKS - 1) / RANKS
    low, out = NUM_TOKENS * RANK * BYTES, NUM_TOKENS * OUT * BYTES
    sent = {"1+4": 0, "2+4": 2 * ring * low, "3+3": ring / RANKS * out, "3+4": ring * low}
    first, second = 2 * NUM_TOKENS * IN * RANK, 2 * NUM_TOKENS * RANK * OUT
    flops = {
        "1+4": first + second / RANKS,
        "2+4": (first + second) / RANKS,
        "3+3": (first + second) / RANKS,
        "3+4": (first + second) / RANKS,
    }
    for name in sent:
        assert found[name].forward_bytes == sent[name]
        assert found[name].comm_bytes == 2 * sent[name]
        assert found[name].flops == 3 * flops[name]
    replicated = {"1+4": RANK * IN, "2+4": 0, "3+3": RANK * (IN + OUT), "3+4": RANK * IN}
    for name, num_weights in replicated.items():
        assert found[name].sync_bytes == 2 * ring * num_weights * 4


@pytest.mark.parametrize("target", ["o_proj", "down_proj"])
def test_a_row_parallel_lora_is_summed_up_by_the_backbone(target: str) -> None:
    best = plans_of("lora", target)[0]
    assert best.name == "2+5"
    assert best.states == (State.PARTIAL, State.PARTIAL)
    assert best.operators == ("A:[-,-,|]", "B:[=,-,-]")
    assert best.comm_bytes == best.num_collectives == 0


def test_the_choice_follows_the_machine() -> None:
    """Without latency, on slow ranks with fast links, splitting all work wins over sending nothing."""
    slow = Machine(num_ranks=RANKS, flops_per_s=1e9, link_bytes_per_s=1e12, latency_s=0.0)
    bypass = bypass_of("lora", "up_proj")
    plans = candidate_plans(bypass, SHAPE, slow, NUM_TOKENS, BYTES)
    assert plans[0].flops == min(plan.flops for plan in plans)
    assert plans_of("lora", "up_proj")[0].name == "1+4"
    assert [plan.cost_s for plan in plans] == sorted(plan.cost_s for plan in plans)


def test_ranks_that_compute_a_serial_adapter_alike_send_nothing() -> None:
    best = plans_of("bottleneck", "o_proj")[0]
    assert best.name == "1+1+1"
    assert best.comm_bytes == best.sync_bytes == 0


def test_the_command_prints_plans_and_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 99, "torch_dtype": "float16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    peft = tmp_path / "adapter_config.json"
    peft.write_text(json.dumps({"peft_type": "LORA", "r": RANK, "target_modules": ["up_proj", "down_proj"]}))
    command = ["explain", "parallel", "--model", str(tmp_path), "--peft", str(peft)]
    main([*command, "--sequence-length", str(NUM_TOKENS)])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line]
    names = [row[0] for row in rows]
    assert names.index("1+4") < names.index("2+5", names.index("1+4"))
    assert ["A:[-,-,|]", "B:[=,-,-]"] in [row[-2:] for row in rows]
    assert {row[0]: row[-1] for row in rows if len(row) == 4}.items() >= {
        "x": "[=,-,-]", "up": "[-,-,|]", "down": "[+,-,-]", "down_proj.low": "[+,-,-]", "next": "[=,-,-]",
    }.items()  # fmt: skip
    with pytest.raises(SystemExit, match=r"^heddle: --ranks: 3 do not divide .* 4 kv heads and .* 64, as 1, 2, 4 do$"):
        main([*command, "--ranks", "3"])
    (tmp_path / "config.json").write_text(
        json.dumps({**sizes, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 48})
    )
    main([*command, "--sequence-length", str(NUM_TOKENS)])
    assert ", 3 ranks, " in capsys.readouterr().out, "the most up to four that divide the model"
