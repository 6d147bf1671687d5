"""A drafter's distillation as the trainer sees it: its vocabulary before, its folder's files after. Pure; knows no tensors."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

from common.drafter_card import Facts, card
from common.drafter_vocabulary import choose_vocabulary, count_tokens
from common.messages import DrafterSpec, JobEvent
from services.trainer.dataset import Dataset
from services.trainer.schedule import StepPlan, plan_steps
from services.trainer.spec import JobSpec

START_TOKENS = 20_000
"""Tokens whose hidden states give the head's first weights."""
MAX_START_SHARE = 0.25
"""Of a job's steps: the rest trains."""
LAST_STEPS = 20
"""Steps at the end that the card's accuracy is the mean of."""
HELD_OUT = "full_valid_mean_token_accuracy"
UNTRAINED = ("vocabulary_V", "embedding_VH", "head_VH")


class DrafterFile(NamedTuple):
    """One file of the folder; `kind` is part of its id."""

    kind: str
    filename: str
    data: bytes


def drafter_spec(spec: JobSpec, dataset: Dataset, vocab_size: int) -> DrafterSpec | None:
    """The drafter that the job trains, if it trains one; the same for the same data set."""
    if spec.drafter is None:
        return None
    counts: Counter[int] = Counter()
    for sequence in dataset.sequences:
        count_tokens(counts, sequence.tokens, compress(sequence.tokens, sequence.in_loss))
    vocabulary = choose_vocabulary(counts, vocab_size, spec.drafter.vocabulary_size)
    start = start_steps(plan_steps(spec, len(dataset.sequences)), dataset.num_tokens)
    return DrafterSpec(vocabulary=tuple(vocabulary), num_steps=spec.drafter.num_steps, start_steps=start)


def start_steps(plan: StepPlan, num_tokens: int) -> int:
    """Steps that gather START_TOKENS, if an epoch has so many; at most a share of all."""
    enough = math.ceil(START_TOKENS * plan.steps_per_epoch / num_tokens)
    return min(enough, plan.steps_per_epoch, int(MAX_START_SHARE * plan.total_steps))


def drafter_files(weights: bytes, spec: JobSpec, dataset: Dataset, metrics: Sequence[JobEvent]) -> list[DrafterFile]:
    """The drafter's folder, from its artifact, whose metadata has its config, and the metrics of all steps."""
    header: dict[str, Any] = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    config: dict[str, Any] = json.loads(header["__metadata__"]["config"])
    text = card(
        Facts(
            model=spec.model,
            layers=config["feature_layers"],
            num_parameters=_num_trained(header),
            vocabulary=header["vocabulary_V"]["shape"][0],
            fingerprint=config["fingerprint"],
            data=f"{len(dataset.sequences):,} conversations of the file {spec.training_file}; {dataset.num_loss_tokens:,}"
            " tokens of their assistant messages were learned from, with what the model itself would have said there.",
            training=f"A finetuning job: {len(metrics):,} steps of {spec.batch_size} conversations, {spec.n_epochs} epochs,"
            f" learning rate {spec.learning_rate:g}.",
            acceptance=_acceptance(spec, metrics),
        )
    )
    return [
        DrafterFile("drafter", "drafter.safetensors", weights),
        DrafterFile("config", "config.json", (json.dumps(config, indent=2) + "\n").encode()),
        DrafterFile("card", "README.md", text.encode()),
    ]


def _num_trained(header: dict[str, Any]) -> int:
    names = [name for name in header if name not in (*UNTRAINED, "__metadata__") and not name.endswith("_scale")]
    return sum(math.prod(header[name]["shape"]) for name in names)


def _acceptance(spec: JobSpec, metrics: Sequence[JobEvent]) -> str:
    if spec.validation_file is None:
        return f"{_accuracy(metrics[-LAST_STEPS:])} Nothing was held out."
    held_out = metrics[-1].data.get(HELD_OUT) if metrics else None
    if held_out is None:
        return f"{_accuracy(metrics[-LAST_STEPS:])} What it scored at the end on the file {spec.validation_file} was lost."
    return (
        f"The drafter's first guess was the model's favourite next token at {held_out:.0%} of the positions of the validation"
        f" file, {spec.validation_file}."
    )


def _accuracy(metrics: Sequence[JobEvent]) -> str:
    if not metrics:
        return "Not measured: the steps' metrics were lost."
    mean = sum(float(event.data["train_mean_token_accuracy"]) for event in metrics) / len(metrics)
    return (
        f"In the last {len(metrics)} steps the drafter's first guess was the model's favourite next token at {mean:.0%} of the"
        " positions that it was trained on."
    )
