"""The finetuning benchmark's plumbing on a tiny model: all sides compute the same loss, and rows judge what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.finetune_alone import check, rows_of
from benchmarks.finetune_sides import (
    FLOOR,
    HEDDLE,
    PEFT,
    PEFT_CHECKPOINTING,
    FloorSide,
    HeddleSide,
    PeftSide,
    forget_peak,
    memory_bytes,
)
from tests.helpers import PEFT_WARNING, tiny_model
from tests.tiny import random_prompt


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_all_sides_compute_the_same_losses(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    dtype = torch.float32
    sides = [HeddleSide(tmp_path, dtype, max_batch_tokens=64)]
    sides += [PeftSide(tmp_path, dtype, checkpointing=flag) for flag in (False, True)]  # type: ignore[misc]
    batch = [random_prompt(n, seed=n, vocab_size=61) for n in (9, 14, 5)]
    for _ in range(2):
        losses = [side.step(batch) for side in sides]
        assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-3)


def test_the_floor_multiplies_every_linear_twice(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    floor = FloorSide(tmp_path, torch.float32)
    with FlopCounterMode(display=False) as counted:
        floor.step([random_prompt(n, seed=n, vocab_size=61) for n in (9, 14, 5)])
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert counted.get_total_flops() == 2 * 2 * 28 * weights


def test_different_first_losses_end_the_benchmark() -> None:
    check({HEDDLE: 2.0, PEFT: 2.03})
    with pytest.raises(SystemExit, match="do not compute the same"):
        check({HEDDLE: 2.0, PEFT: 2.1})


def test_rows_have_medians_ratios_and_goals() -> None:
    def steps(*seconds: float, megabytes: float) -> list[dict[str, Any]]:
        return [{"tokens": 1000, "seconds": s, "bytes_beyond_weights": megabytes * 1e6} for s in seconds]

    results = {
        HEDDLE: steps(1.0, 2.0, 4.0, megabytes=200),
        PEFT: steps(5.0, megabytes=1000),
        PEFT_CHECKPOINTING: steps(3.0, megabytes=300),
        FLOOR: steps(1.0, megabytes=1),
    }
    ours, peft, checkpointing, floor = rows_of("humaneval", results)
    assert (ours["tokens_per_s"], ours["mb_beyond_weights"], ours["met"]) == (500.0, 200, "")
    assert (peft["heddle_over_it"], peft["heddle_memory_over_its"], peft["met"]) == (2.5, 0.2, "yes")
    assert (checkpointing["heddle_over_it"], checkpointing["met"]) == (1.5, "no")
    assert (floor["tokens_per_s"], floor["heddle_over_it"], floor["mb_beyond_weights"], floor["met"]) == (1000.0, 0.5, "", "")


def test_memory_is_read_from_the_process() -> None:
    forget_peak()
    before = memory_bytes("VmHWM")
    held = torch.ones(8 << 20)
    assert memory_bytes("VmHWM") - before > 16e6
    assert memory_bytes("VmRSS") > held.nbytes
