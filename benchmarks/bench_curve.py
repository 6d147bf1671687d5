"""Compares the loss curve of a finetuning job with peft's, step by step: same data, order, start, schedule, clipping.

Run by `make bench-curve`. Nothing is timed. Ends with 1 if the losses of any compared step differ by more than a hundredth.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.report import commit, line, machine, write_csv
from benchmarks.servers import model_folder
from benchmarks.workloads import humaneval_solutions
from common.messages import LatencyProfile, LoraSpec, OptimizerStep, TrainingSlice
from services.cli.parser import DEFAULT_MODEL
from services.executor.engine import Engine
from services.executor.finetune import FinetuneJob, new_job
from services.executor.loader import load_decoder
from services.executor.views import Limits
from services.trainer.schedule import learning_rate_factor

TOLERANCE = 0.01
WARMUP_STEPS, MAX_GRAD_NORM = 5, 1.0
SPEC = LoraSpec(rank=16, alpha=32.0)
PROFILE = LatencyProfile(points=((1, 20.0), (1024, 400.0)), backward_ms_per_token=0.8)
"""Of no machine: a step is cut into windows and units of some size, which must not matter."""
Batch = Sequence[Sequence[int]]


class OurSide:
    """The executor's engine with one job."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        decoder = load_decoder(folder, dtype, torch.device("cpu"))
        self._engine = Engine(
            decoder, num_pages=512, page_size=16, profile=PROFILE, limits=Limits(), max_model_len=4096, max_sequences=1,
            max_tree_nodes=0, max_draft_tokens=0,
        )  # fmt: skip
        self.job: FinetuneJob = new_job("job", SPEC, 0, decoder, self._engine.cache)
        self._engine.training.open(self.job, lease=1)

    def step(self, number: int, batch: Batch, learning_rate: float) -> float:
        """One optimizer step; returns the mean loss."""
        num_predicted = sum(len(tokens) - 1 for tokens in batch)
        update = OptimizerStep(learning_rate=learning_rate, max_grad_norm=MAX_GRAD_NORM)
        for index, tokens in enumerate(batch):
            item = TrainingSlice(
                job_id="job", lease=1, step=number, index=index, tokens=tuple(tokens),
                weights=(0.0, *[1.0 / num_predicted] * (len(tokens) - 1)),
                optimizer=update if index == len(batch) - 1 else None,
            )  # fmt: skip
            self._engine.training.accept(item)
        while self._engine.has_work:
            self._engine.forward_pass()
            for event in self._engine.backward_pass().events:
                if event.step is None:
                    raise SystemExit(event.failure)
                return event.step.loss
        raise SystemExit("the step did not end")


class PeftSide:
    """transformers and peft with autograd, torch's AdamW, and transformers' schedule."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, start: dict[str, Tensor], learning_rate: float, num_steps: int
    ) -> None:
        import peft
        import transformers

        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        config = peft.LoraConfig(
            r=SPEC.rank, lora_alpha=int(SPEC.alpha), target_modules=list(SPEC.target_modules), task_type="CAUSAL_LM"
        )
        self._model: Any = peft.get_peft_model(model, config).train()
        peft.set_peft_model_state_dict(self._model, {name: tensor.clone() for name, tensor in start.items()})
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=0.0)
        self._schedule = transformers.get_scheduler("linear", self._optimizer, WARMUP_STEPS, num_steps)

    def step(self, batch: Batch) -> float:
        """One optimizer step; returns the mean loss."""
        ids = torch.tensor(batch)
        loss = self._model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRAD_NORM)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


def batches(folder: Path, data: Path, length: int, batch_size: int, num_steps: int) -> list[Batch]:
    """Pieces of so many tokens of problems with their solutions, in an order of their own in each epoch."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stream = [token for text in humaneval_solutions(data) for token in tokenizer.encode(text).ids]
    pieces = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    rng = random.Random(0)
    made: list[Batch] = []
    while len(made) < num_steps:
        order = rng.sample(pieces, len(pieces))
        made += [order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
    return made[:num_steps]


def small_model(like: Path, folder: Path) -> Path:
    """A random model of the same family and vocabulary, small enough for any machine."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(like)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32}
    for name, size in {**sizes, "num_key_value_heads": 2}.items():
        setattr(config, name, size)
    torch.manual_seed(0)
    made: Any = transformers.AutoModelForCausalLM
    made.from_config(config).save_pretrained(folder)
    return folder


def compare(folder: Path, work: Sequence[Batch], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each compared step, printed as it comes."""
    dtype, num_steps = getattr(torch, options.dtype), len(work)
    ours = OurSide(folder, dtype)
    theirs = PeftSide(
        folder, getattr(torch, options.peer_dtype), ours.job.adapter.weights.tensors, options.learning_rate, num_steps
    )
    rows: list[dict[str, Any]] = []
    for number, batch in enumerate(work):
        rate = options.learning_rate * learning_rate_factor("linear", number, WARMUP_STEPS, num_steps)
        loss, expected = ours.step(number, batch, rate), theirs.step(batch)
        if number == 0 or (number + 1) % options.every == 0:
            difference = abs(loss - expected) / expected
            row = {"step": number + 1, "heddle": round(loss, 5), "peft": round(expected, 5), "difference": f"{difference:.1e}"}
            rows.append({**row, "met": "yes" if difference <= TOLERANCE else "no"})
            print(line(rows[-1]), flush=True)
    return rows


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--small", action="store_true", help="a small random model of its family instead")
    parser.add_argument(
        "--humaneval", type=Path, default=Path("tests/data/humaneval20.jsonl"), help="JSON lines, maybe gzipped"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of weights and activations")
    parser.add_argument("--peer-dtype", help="of peft, which is slow in bfloat16 on some CPUs")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="each so-manieth step is compared")
    parser.add_argument("--length", type=int, default=96, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--out", type=Path, help="a CSV of the rows")
    options = parser.parse_args()
    options.peer_dtype = options.peer_dtype or options.dtype
    return options


def main() -> None:
    """Run both sides, print the rows."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = model_folder(options.model)
    work = batches(folder, options.humaneval, options.length, options.batch_size, options.steps)
    with tempfile.TemporaryDirectory() as scratch:
        rows = compare(small_model(folder, Path(scratch)) if options.small else folder, work, options)
    shared = {
        "dtype": options.dtype,
        "peer_dtype": options.peer_dtype,
        "machine": machine(),
        "model": "small" if options.small else folder.name,
    }
    if options.out:
        write_csv(options.out, [{**row, **shared, "commit": commit()} for row in rows])
    if any(row["met"] == "no" for row in rows):
        raise SystemExit(f"losses differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
