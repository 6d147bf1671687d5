"""From examples to a drafter's folder: target's traces, vocabulary, start, training, evaluation, card. Needs torch."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress

from common.drafter_card import Facts, card
from common.drafter_vocabulary import choose_vocabulary, count_tokens
from common.fingerprint import fingerprint
from common.model_shape import read_model_shape
from kernels.drafting.design import MAX_DEPTH, WINDOW, feature_layers, inner_size, with_rest
from kernels.drafting.files import CARD, DrafterFilesError, StoredDrafter, read_drafter, write_drafter
from kernels.drafting.head import DraftHead, HeadShape
from services.cli.distill_data import DistillError, Example
from services.cli.distill_evaluate import describe, evaluate
from services.cli.distill_start import start_from_least_squares
from services.cli.distill_states import HiddenStates
from services.cli.distill_target import Target
from services.cli.distill_train import Lesson, Recipe, Trainer, lessons_of


@dataclasses.dataclass(frozen=True)
class Material:
    """What a drafter is trained on and evaluated with, and the untrained head itself."""

    head: DraftHead
    vocabulary: list[int]
    learned: list[Lesson]
    held_out: list[Lesson]


def make(
    folder: Path,
    examples: Sequence[Example],
    out: Path,
    progress: Progress,
    *,
    vocabulary_size: int,
    epochs: float,
    threads: int | None,
    seed: int,
    evaluated_share: float,
    origin: str,
    start: Path | None = None,
) -> str:
    """Train a drafter for the model in `folder` and write it to `out`; returns its card. Raises DistillError.

    `start` is the folder of a drafter of this model that is trained on, with its vocabulary.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    started_at = time.monotonic()
    torch.manual_seed(seed)
    material = prepare(folder, examples, out, progress, vocabulary_size, evaluated_share, seed, start)
    head, recipe = material.head, Recipe(epochs=epochs, seed=seed)
    task = progress.add_task("training", total=1.0, note="")
    num_steps = Trainer(head, recipe).train(
        material.learned, lambda done, loss: progress.update(task, completed=done, note=f"loss {loss:.3f}")
    )
    progress.update(task, completed=1.0)
    name = fingerprint(folder)
    write_drafter(out, head, material.vocabulary, fingerprint=name, max_depth=MAX_DEPTH)
    begun = "" if start is None else f"Started from {start.name}, which may have learned what was held out here. "
    num_learned = sum(lesson.trace.example.num_answer for lesson in material.learned)
    text = card(
        Facts(
            model=folder.name,
            layers=head.shape.feature_layers,
            num_parameters=sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad),
            vocabulary=len(material.vocabulary),
            fingerprint=name,
            data=f"{len(material.learned):,} greedy answers of {folder.name} ({num_learned:,} tokens) to prompts that are"
            f" {origin}; {len(material.held_out):,} more were held out.",
            training=f"{begun}{num_steps:,} steps, {epochs:g} epochs, {_duration(time.monotonic() - started_at)} with"
            f" {torch.get_num_threads()} threads. {recipe!r}",
            acceptance=describe(evaluate(head.eval(), material.held_out, max_depth=5)),
        )
    )
    (out / CARD).write_text(text)
    return text


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def prepare(
    folder: Path,
    examples: Sequence[Example],
    scratch: Path,
    progress: Progress,
    vocabulary_size: int,
    evaluated_share: float,
    seed: int,
    start: Path | None = None,
) -> Material:
    """Let the target read the examples, and set up a head for it; its hidden states take room in the folder `scratch`.

    Raises DistillError for too few, or for a start that is another model's.
    """
    started = None if start is None else started_drafter(start, folder)
    layers = started.shape.feature_layers if started else feature_layers(read_model_shape(folder)[0].num_layers)
    target = Target(folder, layers)
    order = sorted(examples, key=lambda example: example.tokens)
    random.Random(seed).shuffle(order)
    num_evaluated = max(1, round(evaluated_share * len(order)))
    if len(order) <= num_evaluated:
        raise DistillError(f"{len(order)} answers are too few: some are needed to train on, and some to evaluate with")
    num_tokens = target.config.vocab_size
    vocabulary = started.vocabulary if started else _vocabulary(order[num_evaluated:], num_tokens, vocabulary_size)
    places_V = torch.full((target.config.vocab_size,), len(vocabulary))
    places_V[torch.tensor(vocabulary)] = torch.arange(len(vocabulary))
    num_rows = sum(len(example.tokens) for example in order)
    states = HiddenStates(scratch, num_rows, len(layers) * target.config.hidden_size)
    task = progress.add_task("hidden states", total=num_rows, note="")
    parts: list[list[Lesson]] = []
    for part in (order[num_evaluated:], order[:num_evaluated]):
        traces = []
        for trace in target.traces(part):
            traces.append(dataclasses.replace(trace, features_TF=states.keep(trace.features_TF)))
            progress.advance(task, len(trace.example.tokens))
        parts.append(lessons_of(traces, target, places_V, vocabulary))
    if started is not None:
        return Material(started.head(), vocabulary, *parts)
    head = DraftHead(_shape(target, layers), with_rest(target.embedding_VH, vocabulary))
    with torch.no_grad():
        head.head_VH.copy_(with_rest(target.head_VH, vocabulary))
    start_from_least_squares(head, parts[0], target)
    return Material(head, vocabulary, *parts)


def started_drafter(start: Path, folder: Path) -> StoredDrafter:
    """The drafter in `start`, made for the model in `folder`. Raises DistillError."""
    try:
        stored = read_drafter(start)
    except DrafterFilesError as error:
        raise DistillError(str(error)) from error
    if stored.fingerprint != fingerprint(folder):
        raise DistillError(f"{start} drafts for another model than {folder.name}")
    return stored


def _vocabulary(examples: Sequence[Example], vocab_size: int, size: int) -> list[int]:
    counts: Counter[int] = Counter()
    for example in examples:
        count_tokens(counts, example.tokens, example.tokens[example.num_prompt :])
    return choose_vocabulary(counts, vocab_size, size)


def _shape(target: Target, layers: tuple[int, ...]) -> HeadShape:
    """A layer like the target's, its MLP two thirds as wide."""
    config = target.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = getattr(config, "rope_parameters", None) or {}
    return HeadShape(
        hidden_size=config.hidden_size,
        intermediate_size=inner_size(config.intermediate_size),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        feature_layers=layers,
        window=WINDOW,
        rope_theta=float(parameters["rope_theta"] if "rope_theta" in parameters else getattr(config, "rope_theta", 10_000.0)),
        rms_norm_eps=config.rms_norm_eps,
    )
