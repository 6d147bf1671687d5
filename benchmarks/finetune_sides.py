"""One side of the finetuning benchmark in a process of its own: an optimizer step for each line it reads. Knows no other side.

    python -m benchmarks.finetune_sides SIDE MODEL_FOLDER DTYPE THREADS

A line is a JSON list of sequences of token ids; the answer is a JSON object. On every side: LoRA of rank 16 on all linears,
AdamW, the mean loss over all predicted tokens of the step. All but the floor, which trains nothing and tells no loss.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch

from common.messages import LoraSpec, OptimizerStep, TrainingSlice
from services.executor.config import ExecutorConfig
from services.executor.engine import Engine
from services.executor.finetune import new_job
from services.executor.loader import load_decoder
from services.executor.model import KvCache
from services.executor.profiling import NUM_SLOTS, measure_profile
from services.executor.views import Limits

HEDDLE, PEFT, PEFT_CHECKPOINTING, FLOOR = "heddle", "peft", "peft checkpointing", "gemm floor"
SIDES = (HEDDLE, PEFT, PEFT_CHECKPOINTING, FLOOR)
RANK, ALPHA, LEARNING_RATE = 16, 32.0, 2e-4
PAGE_SIZE, NUM_PAGES = 16, 256
Batch = Sequence[Sequence[int]]


class Side(Protocol):
    """A model in training."""

    def step(self, batch: Batch) -> float | None:
        """One optimizer step; returns the mean loss."""


class HeddleSide:
    """The executor's engine with one job, in iterations as long as without any request."""

    def __init__(self, folder: Path, dtype: torch.dtype, max_batch_tokens: int = 1024) -> None:
        decoder = load_decoder(folder, dtype, torch.device("cpu"))
        scratch = KvCache(decoder.config, NUM_SLOTS, dtype, decoder.device)
        limits = Limits(max_batch_tokens=max_batch_tokens, interruptible_ms=ExecutorConfig.interruptible_ms)
        self._engine = Engine(
            decoder, num_pages=NUM_PAGES, page_size=PAGE_SIZE, profile=measure_profile(decoder, scratch, max_batch_tokens),
            limits=limits, max_model_len=4096, max_sequences=1, max_tree_nodes=0, max_draft_tokens=0,
        )  # fmt: skip
        job = new_job("job", LoraSpec(rank=RANK, alpha=ALPHA), 0, decoder, self._engine.cache)
        self._engine.training.open(job, lease=1)
        self._num_steps = 0

    def step(self, batch: Batch) -> float:
        """One optimizer step; returns the mean loss."""
        num_predicted = sum(len(tokens) - 1 for tokens in batch)
        for index, tokens in enumerate(batch):
            is_last = index == len(batch) - 1
            item = TrainingSlice(
                job_id="job", lease=1, step=self._num_steps, index=index, tokens=tuple(tokens),
                weights=(0.0, *[1.0 / num_predicted] * (len(tokens) - 1)),
                optimizer=OptimizerStep(learning_rate=LEARNING_RATE) if is_last else None,
            )  # fmt: skip
            self._engine.training.accept(item)
        self._num_steps += 1
        while self._engine.has_work:
            self._engine.forward_pass()
            for event in self._engine.backward_pass().events:
                if event.step is None:
                    raise RuntimeError(event.failure)
                return event.step.loss
        raise RuntimeError("the step did not end")


class PeftSide:
    """transformers and peft, as their documentation says: a padded batch, autograd, torch's AdamW."""

    def __init__(self, folder: Path, dtype: torch.dtype, *, checkpointing: bool) -> None:
        import peft
        import transformers

        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if checkpointing:
            model.activation_checkpointing_enable()
        config = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
        self._model: Any = peft.get_peft_model(model, config).train()
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def step(self, batch: Batch) -> float:
        """One optimizer step; returns the mean loss."""
        longest = max(map(len, batch))
        ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in batch])
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in batch])
        loss = self._model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


class FloorSide:
    """The least that training any adapter of the frozen model takes: of all rows of a step at once, x W^T forward and dy W
    backward of every linear and the head, by torch. No attention, no adapter, no loss, nothing between the products.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        import transformers

        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.weights_OI: list[torch.Tensor] = [
            module.weight.detach() for module in model.modules() if isinstance(module, torch.nn.Linear)
        ]
        self._none = torch.empty(0)
        self._rows: dict[int, torch.Tensor] = {}

    def step(self, batch: Batch) -> None:
        """The products of one step."""
        num_rows = sum(map(len, batch))
        for weight_OI in self.weights_OI:
            torch.nn.functional.linear(self._rows_of(num_rows, weight_OI.shape[1], weight_OI.dtype), weight_OI)
        for weight_OI in reversed(self.weights_OI):
            torch.mm(self._rows_of(num_rows, weight_OI.shape[0], weight_OI.dtype), weight_OI)

    def _rows_of(self, num_rows: int, num_features: int, dtype: torch.dtype) -> torch.Tensor:
        """Made once for each width: the values do not matter, the time to write them would."""
        if self._rows.get(num_features, self._none).shape[0] < num_rows:
            self._rows[num_features] = torch.ones(num_rows, num_features, dtype=dtype)
        return self._rows[num_features][:num_rows]


def make(side: str, folder: Path, dtype: torch.dtype) -> Side:
    """A side by its name."""
    if side == HEDDLE:
        return HeddleSide(folder, dtype)
    if side == FLOOR:
        return FloorSide(folder, dtype)
    return PeftSide(folder, dtype, checkpointing=side == PEFT_CHECKPOINTING)


def num_weights(folder: Path) -> int:
    """Elements of a model's safetensors files."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            names: list[str] = file.keys()
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return count


def memory_bytes(field: str) -> int:
    """A field of this process's /proc status: VmRSS is what it holds, VmHWM the most that it held since `forget_peak`."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def forget_peak() -> None:
    """What was held for a moment while weights were loaded shall not count."""
    Path("/proc/self/clear_refs").write_text("5")


def serve(side: str, folder: Path, dtype: torch.dtype) -> None:
    """Answer lines until there are no more."""
    before = memory_bytes("VmRSS")
    weights = num_weights(folder) * dtype.itemsize
    trained = make(side, folder, dtype)
    forget_peak()
    print(json.dumps({"side": side, "pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        batch = json.loads(line)
        started_at = time.perf_counter()
        loss = trained.step(batch)
        seconds = time.perf_counter() - started_at
        beyond = memory_bytes("VmHWM") - before - weights
        answer = {"loss": loss, "seconds": seconds, "tokens": sum(map(len, batch)), "bytes_beyond_weights": beyond}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    serve(sys.argv[1], Path(sys.argv[2]), getattr(torch, sys.argv[3]))
