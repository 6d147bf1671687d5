"""A drafter's distillation on this executor: its head, its optimizer, its work in units. Knows neither bus nor schedule.

The target is frozen: its windows give hidden states and what it would say next, nothing goes back through it. What the head
learns from them runs in units of bounded work, as many as an iteration has time for.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterator

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from common.messages import DrafterSpec, EvaluationSlice, OptimizerStep, TrainingSlice
from kernels.drafting.design import MAX_DEPTH, WINDOW, feature_layers, inner_size, with_rest
from kernels.drafting.files import drafter_config, drafter_weights
from kernels.drafting.head import DraftHead, HeadShape
from kernels.drafting.start import start_from_identity
from kernels.drafting.training import MAPS, HeadOptimizer
from services.executor.adapter_spec import InvalidAdapterError
from services.executor.evaluation import Score
from services.executor.head_start import HeadStart, is_narrow
from services.executor.job_steps import MAX_GROUP_ROWS, GroupResult, SteppedJob, number
from services.executor.lesson import LessonSequence, ReducedVocabulary
from services.executor.lesson_units import UPDATE_COST, LessonUnits, Unit
from services.executor.lora import read_tensors
from services.executor.model import Decoder
from services.executor.model_config import ModelConfig

FITTED_SHARE = 0.125
"""Learning rate of maps that come from least squares, as a share of the layer's: they are easily spoilt."""


class DistillationJob(SteppedJob[LessonSequence]):
    """One head in training."""

    def __init__(self, job_id: str, spec: DrafterSpec, decoder: Decoder, fingerprint: str, seed: int = 0) -> None:
        """Raises InvalidAdapterError for a specification that no drafter of this model can have."""
        check_drafter(spec, decoder.config)
        super().__init__(job_id, decoder, 0, seed)
        self._spec, self._fingerprint = spec, fingerprint
        self._vocabulary = ReducedVocabulary(spec.vocabulary, decoder.config.vocab_size, decoder.device)
        self.head = _new_head(spec, decoder, seed)
        self._optimizer = HeadOptimizer(self.head)
        self._model_cost = _model_cost(decoder.config)
        self._start = HeadStart(self.head) if spec.start_steps and is_narrow(self.head) else None
        """While it gathers for the first weights."""
        self._evaluations = deque[EvaluationSlice]()
        """Those that wait, and the one in work."""
        self._units: Iterator[Unit] | None = None
        self._next: Unit | None = None
        self._credit = 0.0
        self._grad_norm = 0.0

    @property
    def num_evaluations(self) -> int:
        """Held-out texts that wait or are in work."""
        return len(self._evaluations)

    def evaluate(self, item: EvaluationSlice) -> bool:
        """Queue a valid held-out text, which the head is only to show what it knows of; False if it is queued already."""
        if any((item.step, item.index) == (other.step, other.index) for other in self._evaluations):
            return False
        self._evaluations.append(item)
        return True

    def start_next(self, max_rows: int = MAX_GROUP_ROWS) -> tuple[LessonSequence, ...]:
        """See SteppedJob; held-out texts come first, each as a group of its own."""
        if not self.group and self._evaluations:
            held = TrainingSlice(**msgspec.structs.asdict(self._evaluations[0]))
            self.group = (self._sequence(held),)
        return super().start_next(max_rows)

    def finish(self) -> GroupResult | None:
        """See SteppedJob; a held-out text leaves a score and changes nothing."""
        if not self._evaluations:
            return super().finish()
        if not self._is_through():
            return None
        (sequence,), self.group = self.group, ()
        held = self._evaluations.popleft()
        counts = {"num_correct": sequence.num_correct, "num_tokens": sequence.num_tokens}
        return GroupResult(num_sequences=1, score=Score(step=held.step, index=held.index, loss=sequence.loss, **counts))

    def advance(self, budget: float) -> float:
        """Run the group's next units that `budget` pays for, in forward tokens of the target; returns what they cost.

        What is left is kept for a unit that costs more than one budget. Raises TrainingDivergedError.
        """
        self._credit += budget
        done = 0.0
        with torch.inference_mode(False), torch.enable_grad():
            while (unit := self._peek()) is not None and (cost := unit.cost / self._model_cost) <= self._credit:
                unit.run()
                self._next = None
                self._credit -= cost
                done += cost
        if self._next is None:
            self._credit = 0.0
        return done

    def artifact(self) -> bytes:
        """The drafter's weights; the metadata's `config` is its config.json."""
        config = drafter_config(self.head, fingerprint=self._fingerprint, max_depth=MAX_DEPTH)
        return drafter_weights(self.head, self._vocabulary.tokens, {"config": json.dumps(config)})

    def checkpoint(self) -> bytes:
        """Head, moments, vocabulary, step and seed before the step in work; all that is random depends on these two."""
        tensors = {name: tensor.contiguous() for name, tensor in self._state().items()}
        tensors |= {"step": torch.tensor(self.step), "seed": torch.tensor(self._seed)}
        return safetensors.torch.save(tensors | {"vocabulary": self._vocabulary.tokens_V})

    def restore(self, data: bytes) -> None:
        """See SteppedJob."""
        what = f"checkpoint of job {self.job_id}"
        tensors = read_tensors(data, what)
        step, seed = (number(tensors, name, what) for name in ("step", "seed"))
        if step < 0:
            raise InvalidAdapterError(f"{what}: step is {step}")
        if step >= self._spec.start_steps:
            self._start = None
        if tensors.pop("vocabulary", torch.empty(0)).tolist() != list(self._vocabulary.tokens):
            raise InvalidAdapterError(f"{what} is of another vocabulary")
        state = self._state()
        if (shapes := {n: t.shape for n, t in tensors.items()}) != {n: t.shape for n, t in state.items()}:
            raise InvalidAdapterError(f"{what} is of another head: {shapes}")
        for name, tensor in state.items():
            tensor.copy_(tensors[name])
        self._resume_at(step, seed)

    def _state(self) -> dict[str, Tensor]:
        optimizer = self._optimizer
        parts = {"": {n: p.data for n, p in optimizer.parameters.items()}, "exp_avg.": optimizer.exp_avg}
        parts["exp_avg_sq."] = optimizer.exp_avg_sq
        parts["start."] = {} if self._start is None else self._start.tensors()
        return {prefix + name: tensor for prefix, tensors in parts.items() for name, tensor in tensors.items()}

    def _sequence(self, item: TrainingSlice) -> LessonSequence:
        with torch.inference_mode(False):  # gradients are asked of what is computed from it
            return LessonSequence(item, self._decoder, self.head.shape.feature_layers, self._vocabulary)

    def _peek(self) -> Unit | None:
        """The unit that is next; None when the group is through."""
        if self._units is None:
            self._units = self._work()
        if self._next is None:
            self._next = next(self._units, None)
        return self._next

    def _is_through(self) -> bool:
        if self._peek() is not None:
            return False
        self._units = None
        return True

    def _work(self) -> Iterator[Unit]:
        """All units of the forwarded group, and of the update that it may end with."""
        start, order = self._start, self.group[-1].item.optimizer
        is_held_out = self.num_evaluations > 0
        learns = start is None and not is_held_out
        for sequence in self.group:
            for unit in LessonUnits(self.head, sequence, self._spec.num_steps, self._seed, learns=learns, is_exact=is_held_out):
                yield unit
                self._check_finite("loss", sequence.loss)
            if start is not None and not is_held_out:
                yield from start.units(sequence)
        if order is None:
            return
        if start is not None:
            yield from start.end_step(is_last=self.step + 1 == self._spec.start_steps)
        else:
            num_weights = sum(parameter.numel() for parameter in self._optimizer.parameters.values())
            yield Unit(UPDATE_COST * num_weights, lambda: self._update(order))

    def _update(self, order: OptimizerStep) -> None:
        """As a whole: a checkpoint must not come between."""
        self._grad_norm = self._optimizer.clip(order.max_grad_norm)
        self._check_finite("gradient norm", self._grad_norm)
        first = self._num_fitted
        for name in self._optimizer.parameters:
            share = FITTED_SHARE if first and name in MAPS else 1.0
            self._optimizer.update(name, self.step + 1 - first, share * order.learning_rate)

    @property
    def _num_fitted(self) -> int:
        """Steps before the first update."""
        return self._spec.start_steps if is_narrow(self.head) else 0

    def _optimize(self, optimizer: OptimizerStep) -> float:
        if self._start is not None and self.step + 1 >= self._spec.start_steps:
            self._start = None
        return self._grad_norm  # the last unit took it up


def check_drafter(spec: DrafterSpec, config: ModelConfig) -> None:
    """Raises InvalidAdapterError, naming the field."""
    tokens = spec.vocabulary
    if not tokens or any(low >= high for low, high in itertools.pairwise(tokens)):
        raise InvalidAdapterError("drafter.vocabulary: must be rising token ids, at least one")
    if not 0 <= tokens[0] <= tokens[-1] < config.vocab_size:
        raise InvalidAdapterError(f"drafter.vocabulary: ids must be in [0, {config.vocab_size})")
    if spec.start_steps < 0:
        raise InvalidAdapterError(f"drafter.start_steps: must not be negative, not {spec.start_steps}")
    if not 1 <= spec.num_steps <= MAX_DEPTH:
        raise InvalidAdapterError(f"drafter.num_steps: must be 1 to {MAX_DEPTH}, not {spec.num_steps}")


def _new_head(spec: DrafterSpec, decoder: Decoder, seed: int) -> DraftHead:
    """A layer like the target's, in float32, with its embeddings and its head's rows of the vocabulary."""
    config = decoder.config
    shape = HeadShape(
        hidden_size=config.hidden_size,
        intermediate_size=inner_size(config.intermediate_size),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        feature_layers=feature_layers(config.num_layers),
        window=WINDOW,
        rope_theta=config.rope.theta,
        rms_norm_eps=config.rms_norm_eps,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = DraftHead(shape, with_rest(decoder.embedding_VH, spec.vocabulary).float().cpu()).to(decoder.device)
    with torch.no_grad():
        head.head_VH.copy_(with_rest(decoder.head.weight(), spec.vocabulary))
    start_from_identity(head, decoder.final_norm_H.float())
    return head


def _model_cost(config: ModelConfig) -> int:
    """Multiply-adds of one token through the target, attention to its context aside."""
    hidden, attended = config.hidden_size, config.num_heads * config.head_dim
    layer = hidden * sum(config.qkv_sizes) + attended * hidden + 3 * hidden * config.intermediate_size
    return config.num_layers * layer + config.vocab_size * hidden
