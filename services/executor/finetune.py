"""A finetuning job on this executor: its adapter, optimizer and queue of slices. Knows neither bus nor schedule.

Slices are forwarded in windows of any size, whenever the engine has room, then go backward in windows of any size; the sum
over a step's slices equals whole-sequence training. Short slices of a step are in work together, as a group: they share passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque

import safetensors.torch
import torch
from torch import Tensor

from common.messages import LoraSpec, OptimizerStep, TrainingSlice
from kernels import ops
from services.executor.adapter_spec import InvalidAdapterError
from services.executor.backward_cursor import BackwardCursor
from services.executor.lora import LoraAdapter, LoraWeights, read_tensors
from services.executor.model import Decoder, KvCache
from services.executor.training_sequence import InvalidSliceError, TrainingSequence, check_slice

MAX_GROUP_ROWS = 512
"""Rows of sequences in work together: enough for large matmuls, and their activations take what one long sequence would."""


class OutOfOrderSliceError(InvalidSliceError):
    """A slice before this one is missing."""


class TrainingDivergedError(Exception):
    """Loss or gradient stopped being finite; the job's adapter still is what the last good step left."""

    def __init__(self, job_id: str, step: int, what: str, value: float) -> None:
        super().__init__(f"job {job_id}: the {what} of step {step} is {value}; a lower learning rate may help")
        self.job_id, self.step = job_id, step


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an optimizer step did; the fields are StepDone's."""

    step: int
    loss: float
    grad_norm: float
    num_correct: int
    num_tokens: int
    num_sequence_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupResult:
    """A group that is through, which has no more use for its slots; `step` is set at a step's end."""

    num_sequences: int
    step: StepResult | None = None


@dataclasses.dataclass
class _Totals:
    """Sums over the finished sequences of the step in work."""

    loss: float = 0.0
    num_correct: int = 0
    num_tokens: int = 0
    num_sequence_tokens: int = 0

    def add(self, sequence: TrainingSequence) -> None:
        self.loss += sequence.loss
        self.num_correct += sequence.num_correct
        self.num_tokens += sequence.num_tokens
        self.num_sequence_tokens += len(sequence.tokens)


class FinetuneJob:
    """One adapter in training. `step` is its next optimizer step's number, `group` the sequences in work, all of that step."""

    def __init__(
        self,
        job_id: str,
        adapter: LoraAdapter,
        decoder: Decoder,
        cache: KvCache,
        step: int = 0,
        max_recompute_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.job_id = job_id
        self.adapter = adapter.in_training()
        self.step = step
        self._seed = seed
        self.group: tuple[TrainingSequence, ...] = ()
        self._decoder, self._cache = decoder, cache
        self._grads, self._exp_avg, self._exp_avg_sq = (self._like_adapter() for _ in range(3))
        self._plan = adapter.activation_plan(decoder.config.shape, max_recompute_share)
        self._queue: deque[TrainingSlice] = deque()
        self._expected = (step, 0)
        self._cursors: tuple[BackwardCursor, ...] = ()
        self._totals = _Totals()

    def accept(self, item: TrainingSlice) -> bool:
        """Queue a slice; False for one that came before. Raises InvalidSliceError, OutOfOrderSliceError if one is missing."""
        key = (item.step, item.index)
        if key < self._expected:
            return False
        if key > self._expected:
            raise OutOfOrderSliceError(f"slice (step, index) {key} came, {self._expected} is next")
        check_slice(item, self._decoder)
        self._queue.append(item)
        self._expected = (item.step, item.index + 1) if item.optimizer is None else (item.step + 1, 0)
        return True

    def start_next(self, max_rows: int = MAX_GROUP_ROWS) -> tuple[TrainingSequence, ...]:
        """The group in work; if there was none, the next slices of the queue: one, or several with so many rows together."""
        if not self.group:
            group: list[TrainingSequence] = []
            dropout = self.adapter.spec.dropout
            while self._queue and self._joins(group, self._queue[0], max_rows):
                group.append(TrainingSequence(self._queue[0], self._decoder, self._plan, dropout=dropout, seed=self._seed))
                self._queue.popleft()
            self.group = tuple(group)
        return self.group

    @property
    def is_forwarded(self) -> bool:
        """Whether a group is in work and can go backward."""
        return bool(self.group) and all(sequence.is_forwarded for sequence in self.group)

    def cursors(self) -> tuple[BackwardCursor, ...]:
        """Where each sequence of the forwarded group is on its way back.

        Raises TrainingDivergedError if a loss is not finite: then the job is over.
        """
        if not self.is_forwarded:
            raise ValueError(f"job {self.job_id} has no forwarded sequence")
        if not self._cursors:
            for sequence in self.group:
                self._check_finite("loss", sequence.loss)
            self._cursors = tuple(BackwardCursor(self._decoder, self.adapter, self._grads, sequence) for sequence in self.group)
        return self._cursors

    def finish(self) -> GroupResult | None:
        """Take up the group's gradients once all of its sequences are through; may end a step. None if they are not yet.

        Raises TrainingDivergedError if the gradient is not finite: then the job is over.
        """
        if not all(cursor.is_done for cursor in self.cursors()):
            return None
        group, self.group, self._cursors = self.group, (), ()
        for sequence in group:
            self._totals.add(sequence)
        optimizer = group[-1].item.optimizer
        step = None if optimizer is None else self._optimize(optimizer)
        return GroupResult(num_sequences=len(group), step=step)

    def checkpoint(self) -> bytes:
        """Adapter, moments, step and seed before the step in work, as safetensors bytes.

        The step is the data cursor too, and with the seed all the state that random numbers have: masks are functions of them.
        """
        tensors = {"step": torch.tensor(self.step), "seed": torch.tensor(self._seed)}
        for prefix, weights in self._state().items():
            tensors |= {prefix + name: tensor.contiguous() for name, tensor in weights.tensors.items()}
        return safetensors.torch.save(tensors)

    def restore(self, data: bytes) -> None:
        """Take up the state that `checkpoint` wrote; only for a new job. Raises InvalidAdapterError if it does not fit."""
        what = f"checkpoint of job {self.job_id}"
        tensors = read_tensors(data, what)
        step, seed = (_number(tensors, name, what) for name in ("step", "seed"))
        if step < 0:
            raise InvalidAdapterError(f"{what}: step is {step}")
        state = self._state()
        for prefix, weights in state.items():
            own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            weights.copy_from(own, what)
        self.step, self._seed = step, seed
        self._expected = (self.step, 0)

    def _state(self) -> dict[str, LoraWeights]:
        """What a checkpoint holds, by prefix; the adapter last, because its prefix is empty."""
        return {"exp_avg.": self._exp_avg, "exp_avg_sq.": self._exp_avg_sq, "": self.adapter.weights}

    def _like_adapter(self) -> LoraWeights:
        weights = self.adapter.weights
        return LoraWeights(
            self.adapter.spec,
            self._decoder.config,
            layers=weights.layers,
            dtype=weights.flat.dtype,
            device=weights.flat.device,
        )

    def _joins(self, group: list[TrainingSequence], item: TrainingSlice, max_rows: int) -> bool:
        """Whether a slice is of the group's step and still fits in."""
        num_rows = sum(sequence.num_rows for sequence in group) + len(item.tokens)
        return not group or (item.step == group[0].item.step and num_rows <= max_rows)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingDivergedError(self.job_id, self.step, what, value)

    def _optimize(self, optimizer: OptimizerStep) -> StepResult:
        grad_norm = float(ops.clip_grad_norm([self._grads.flat], optimizer.max_grad_norm))
        self._check_finite("gradient norm", grad_norm)
        self._update(optimizer)
        self._grads.flat.zero_()
        totals, self._totals = self._totals, _Totals()
        self.step += 1
        return StepResult(step=self.step - 1, grad_norm=grad_norm, **dataclasses.asdict(totals))

    def _update(self, optimizer: OptimizerStep) -> None:
        weights, grads = [self.adapter.weights.flat], [self._grads.flat]
        learning_rate, weight_decay = optimizer.learning_rate, optimizer.weight_decay
        if optimizer.method == "sgd":
            momentum = optimizer.momentum
            ops.sgd(
                weights, grads, [self._exp_avg.flat], learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay
            )
            return
        ops.adamw(
            weights,
            grads,
            [self._exp_avg.flat],
            [self._exp_avg_sq.flat],
            step=self.step + 1,
            learning_rate=learning_rate,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            eps=optimizer.eps,
            weight_decay=weight_decay,
        )


def new_job(
    job_id: str, spec: LoraSpec, seed: int, decoder: Decoder, cache: KvCache, max_recompute_share: float = 0.0
) -> FinetuneJob:
    """A job at step 0. Raises InvalidAdapterError for an impossible specification or a model that cannot be trained."""
    if (part := decoder.config.untrainable_part) is not None:
        raise InvalidAdapterError(f"this model cannot be finetuned yet: its {part} have no backward pass")
    adapter = LoraAdapter.initialized(job_id, spec, decoder.config, seed, decoder.device)
    return FinetuneJob(job_id, adapter, decoder, cache, max_recompute_share=max_recompute_share, seed=seed)


def _number(tensors: dict[str, Tensor], name: str, what: str) -> int:
    value = tensors.pop(name, None)
    if value is None or value.numel() != 1:
        raise InvalidAdapterError(f"{what} has no {name}")
    return int(value)
