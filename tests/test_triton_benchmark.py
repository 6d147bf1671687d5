"""The GPU benchmark runs to its end at tiny sizes, all stages with what they write; a wrong kernel is found and not timed."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

import tests.triton_stage as stage
from benchmarks import bench_gpu, gpu_kernels, gpu_model
from benchmarks.gpu_device import Ceilings, CpuDevice
from benchmarks.gpu_results import Results
from benchmarks.kernel_case import Case, Goal
from benchmarks.kernel_cases import Cases
from common.messages import LatencyProfile
from kernels import ops
from services.executor.model import Decoder

SLUG = "gpu-*-tiny"


@pytest.mark.timeout(180)  # it takes 15 s of a core
@pytest.mark.skipif(stage.HAS_GPU, reason="there the stages run with their own sizes")
def test_all_stages_at_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "interprets_triton", True)
    monkeypatch.setenv("HEDDLE_KERNELS", "triton")  # as it sets by itself, and not beyond this test
    bench_gpu.main(["--tiny", "--out", str(tmp_path)])
    (path,) = tmp_path.glob(f"{SLUG}.json")
    stages = json.loads(path.read_text())["stages"]
    assert list(stages) == ["kernels", "iteration", "peer", "profile"]
    for name, found in stages.items():
        assert found["copy_gb_s"] > 0
        (table,) = tmp_path.glob(f"{SLUG}-{name}.csv")
        assert len(list(csv.DictReader(table.read_text().splitlines()))) == len(found["rows"]) > 0
    kernels = [row for row in stages["kernels"]["rows"] if row["provider"] == "heddle"]
    assert len({row["kernel"] for row in kernels}) >= 16
    assert {row["kernel"] for row in kernels if row.get("goal")} == {
        "rms_norm", "add_rms_norm", "silu_mul", "rope_and_cache", "ragged_attention", "linears and segmented_lora",
    }  # fmt: skip
    assert {row["load"] for row in stages["iteration"]["rows"]} == {"plain", "trees", "window", "trees + window"}
    assert all(row["kernels"] > 0 and row["roofline_ms"] > 0 for row in stages["iteration"]["rows"])
    (profile,) = tmp_path.glob("llama-3.1-8b-tiny--*.json")
    assert msgspec.convert(json.loads(profile.read_text())["profile"], LatencyProfile).points
    if importlib.util.find_spec("matplotlib"):
        assert len(list(tmp_path.glob(f"{SLUG}-*.svg"))) == 2


def test_a_wrong_kernel_is_told_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.randn(3, 4)

    def case(name: str, error: float) -> Case:
        oracle, run = (lambda: (right,)), (lambda: (right * error,))
        return Case(kernel=name, shape="", run=run, oracle=oracle, num_bytes=1, goal=Goal("of_copy", 0.8))

    cases = [case("wrong", 1.1), case("right", 1.0), case("nan", torch.nan)]
    monkeypatch.setattr(Cases, "__iter__", lambda _: iter(cases))
    results = Results(tmp_path, "device")
    results.start("kernels")
    with pytest.raises(SystemExit, match="2 cases are wrong"):
        gpu_kernels.run(CpuDevice(), torch.float32, Ceilings(1e9, 1.0), results, is_tiny=True)
    rows = {(row["kernel"], row["provider"]): row for row in results.rows("kernels")}
    assert set(rows) == {("wrong", "heddle"), ("right", "heddle"), ("right", "reference"), ("nan", "heddle")}
    assert "relative error 1.00e-01" in str(rows["wrong", "heddle"]["wrong"])
    assert rows["right", "heddle"]["is_met"] is False
    assert Goal("over_peer", 0.05).is_met(0.04)


def test_a_stage_that_runs_again_leaves_the_others(tmp_path: Path) -> None:
    for stage_name in ("kernels", "iteration", "kernels"):
        results = Results(tmp_path, "Some GPU 80GB")
        results.start(stage_name)
        results.add(stage_name, {"ms": 1.23456789})
    assert [len(results.rows(name)) for name in ("kernels", "iteration")] == [1, 1]
    assert (tmp_path / "gpu-some-gpu-80gb-kernels.csv").read_text().split() == ["ms", "1.2346"]


def test_the_model_has_llamas_weights() -> None:
    num_weights = gpu_model.weight_bytes(gpu_model.LLAMA_3_1_8B, torch.bfloat16) // 2
    assert num_weights + 128256 * 4096 + 65 * 4096 == 8030261248, "with the embedding and the norms: the model card's 8.03B"
    decoder = gpu_model.random_decoder(gpu_model.TINY, torch.float32, torch.device("cpu"))
    held = sum(linear.weight().numel() for linear in _linears(decoder))
    assert held * 4 == gpu_model.weight_bytes(gpu_model.TINY, torch.float32)


def _linears(decoder: Decoder) -> list[ops.Linear]:
    layers = [linear for layer in decoder.linears for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return [decoder.head, *layers]


@pytest.mark.skipif(stage.HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = subprocess.run([sys.executable, "-m", "benchmarks.bench_gpu"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "torch sees none here" in result.stderr
