"""The memory table: the paper's 70B case, the arithmetic behind it, and what the command prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.activation_plan import MAX_WINDOW_TOKENS, plan_activations
from common.bypasses import bypasses_of
from common.memory_table import MemoryTable, memory_table, saved_share
from common.model_shape import ModelShape
from services.cli.__main__ import main

LLAMA_70B = ModelShape(
    hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128, intermediate_size=28672, vocab_size=128256
)
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 16, "target_modules": ["down_proj"]},
    "lora, all": {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"},
    "adapter": {"peft_type": "BOTTLENECK", "bottleneck_size": 64, "non_linearity": "relu"},
    "ia3": {"peft_type": "IA3"},
}
NUM_TOKENS, FP16_BYTES = 1024, 2


def table_of(config: dict[str, Any], recompute_share: float = 0.0, num_tokens: int = NUM_TOKENS) -> MemoryTable:
    bypasses = bypasses_of(config, LLAMA_70B)
    return memory_table(plan_activations(LLAMA_70B, bypasses, recompute_share), bypasses, num_tokens, FP16_BYTES)


@pytest.mark.parametrize(("name", "papers"), [("lora", 0.852), ("lora, all", 0.852), ("adapter", 0.848), ("ia3", 0.870)])
def test_at_least_the_papers_share_is_saved(name: str, papers: float) -> None:
    table = table_of(CONFIGS[name])
    assert saved_share(table.total) >= papers
    assert list(table.total) == sorted(table.total, reverse=True)
    for row in table.forward:
        assert list(row.num_bytes) == sorted(row.num_bytes, reverse=True)


def test_the_table_is_the_arithmetic_of_a_layer() -> None:
    """LoRA on down_proj, elements per token: h is 8192, f 28672, keys or values 1024, a head's scores 1024."""
    h, f, kv, scores = 8192, 28672, 1024, 64 * 1024
    layer = 9 * h + 3 * kv + 4 * f + 2 * scores + 16  # x y q_raw q out o m z down; k_raw k v; gate up silu h; scores, softmax
    head = 2 * h + 128256
    per_element = NUM_TOKENS * FP16_BYTES
    unpruned, pruned, remade, last = table_of(CONFIGS["lora"]).forward_total
    assert unpruned == (80 * layer + head) * per_element
    upper = 3 * h + 2 * kv + 2 * f
    lowest = 2 * kv + f
    assert last == (79 * upper + lowest) * per_element
    assert remade == last + (h + 128256) * per_element
    assert pruned == remade + (79 * (2 * f + scores) + 80 * 16) * per_element


def test_a_share_of_the_forward_pass_buys_the_mlps_activations() -> None:
    plain, again = (table_of(CONFIGS["lora, all"], share) for share in (0.0, 0.6))
    gate_up = sum(row.num_bytes[-1] for row in plain.forward if row.name in ("gate", "up"))
    assert gate_up > 0.6 * plain.total[-1]
    assert again.forward_total[-1] <= plain.forward_total[-1] - gate_up + 2 * LLAMA_70B.hidden_size * NUM_TOKENS * FP16_BYTES
    assert saved_share(again.total) > 0.94


def test_memory_grows_with_the_sequence_but_windows_do_not() -> None:
    short, long = (table_of(CONFIGS["lora"], num_tokens=n) for n in (2048, 4096))
    assert long.forward_total[-1] == 2 * short.forward_total[-1]
    again = [next(row for row in table.backward if row.name == "made again").num_bytes[-1] for table in (short, long)]
    # Scores and softmax alone see the whole sequence.
    assert again[1] - again[0] == MAX_WINDOW_TOKENS * (2 * 64 * 2048) * FP16_BYTES


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model of which only the sizes are known."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "float16",
    }  # fmt: skip
    folder = tmp_path / "70b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_config(folder: Path, config: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(config))
    return path


def test_the_command_prints_every_tensor_and_the_totals(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path, CONFIGS["lora"])
    main(["explain", "memory", "--model", str(model_dir), "--peft", str(tmp_path), "--sequence-length", "1024"])
    lines = capsys.readouterr().out.splitlines()
    table = table_of(CONFIGS["lora"])
    printed = {line.split()[0]: line.split() for line in lines if line}
    for row in table.forward:
        figures = [f"{num_bytes / 1e9:.4f}" if num_bytes else "-" for num_bytes in row.num_bytes]
        assert printed[row.name][-4:] == figures
    assert printed["total"][1:] == [f"{num_bytes / 1e9:.4f}" for num_bytes in table.total]
    assert [line.split()[-1] for line in lines if "less than" in line][-1] == f"{saved_share(table.total):.1%}"
    assert "  layers 1 to 79: x [T, 8192], q [T, 8192], m [T, 8192], gate_up [T, 57344]" in lines


@pytest.mark.parametrize("subject", ["memory", "parallel"])
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "No such file"),
        ("text", "is not a JSON object"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type: must be one of LORA, IA3, BOTTLENECK"),
        ({"peft_type": "LORA", "target_modules": ["c_attn"]}, "target_modules: ['c_attn'] matches no linear"),
    ],
    ids=str,
)
def test_what_cannot_be_explained_is_one_line(
    subject: str, config: object, reason: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none.json" if config is None else write_config(tmp_path, config)
    with pytest.raises(SystemExit, match=rf"^heddle: {path}.*") as caught:
        main(["explain", subject, "--model", str(model_dir), "--peft", str(path)])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    path = write_config(tmp_path, CONFIGS["lora"])
    with pytest.raises(SystemExit, match=r"^heddle: no model at .*/nowhere"):
        main(["explain", "memory", "--model", str(tmp_path / "nowhere"), "--peft", str(path)])
