"""The separate set-up's finetuning: peft and transformers' Trainer on given batches, a line of JSON per step. Knows no server.

    python -m benchmarks.hf_trainer MODEL_FOLDER DTYPE THREADS BATCHES_FILE

BATCHES_FILE holds {"learning_rate", "steps"}; a step is a list of {"tokens", "in_loss"}, as many in each. A line has the step's
mean loss, its tokens, and its start and end in seconds since the epoch.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from benchmarks.finetune_sides import ALPHA, RANK

IGNORED = -100
"""The label of a token that is not trained."""


class Told(transformers.TrainerCallback):
    """Prints a line for every step."""

    def __init__(self, num_tokens: Sequence[int]) -> None:
        self._num_tokens = num_tokens
        self._started_at = time.time()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started_at = time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            answer = {"step": state.global_step, "loss": logs["loss"], "tokens": self._num_tokens[state.global_step - 1]}
            print(json.dumps(answer | {"started_at": self._started_at, "ended_at": time.time()}), flush=True)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A padded batch."""
    longest = max(len(row["tokens"]) for row in rows)
    padded = [(row["tokens"], row["in_loss"], longest - len(row["tokens"])) for row in rows]
    labels = [[token if kept else IGNORED for token, kept in zip(tokens, mask, strict=True)] for tokens, mask, _ in padded]
    return {
        "input_ids": torch.tensor([[*tokens, *[0] * room] for tokens, _, room in padded]),
        "attention_mask": torch.tensor([[1] * len(tokens) + [0] * room for tokens, _, room in padded]),
        "labels": torch.tensor([[*kept, *[IGNORED] * room] for kept, (_, _, room) in zip(labels, padded, strict=True)]),
    }


def train(folder: Path, dtype: torch.dtype, steps: list[list[dict[str, Any]]], learning_rate: float) -> None:
    """All steps in their order, as peft's and transformers' documentation says."""
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            output_dir=out, max_steps=len(steps), per_device_train_batch_size=len(steps[0]), learning_rate=learning_rate,
            lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
            train_sampling_strategy="sequential", remove_unused_columns=False,
        )  # fmt: skip
        told = Told([sum(len(row["tokens"]) for row in step) for step in steps])
        trainer = transformers.Trainer(
            model=peft.get_peft_model(base, config), args=arguments, data_collator=collate, callbacks=[told],
            train_dataset=[row for step in steps for row in step],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    job = json.loads(Path(sys.argv[4]).read_text())
    train(Path(sys.argv[1]), getattr(torch, sys.argv[2]), job["steps"], job["learning_rate"])
