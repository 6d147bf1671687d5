"""A finetuning job on this executor: its adapter and optimizer. Knows neither bus nor schedule.

Slices are forwarded in windows of any size, whenever the engine has room, then go backward in windows of any size; the sum
over a step's slices equals whole-sequence training.
"""

from __future__ import annotations

import safetensors.torch
import torch

from common.messages import LoraSpec, OptimizerStep, TrainingSlice
from kernels import ops
from services.executor.adapter_spec import InvalidAdapterError
from services.executor.backward_cursor import BackwardCursor
from services.executor.job_steps import SteppedJob, number
from services.executor.lora import LoraAdapter, LoraWeights, read_tensors
from services.executor.model import Decoder, KvCache
from services.executor.training_sequence import TrainingSequence


class FinetuneJob(SteppedJob[TrainingSequence]):
    """One adapter in training."""

    adapter: LoraAdapter

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
        super().__init__(job_id, decoder, step, seed)
        self.adapter = adapter.in_training()
        self._cache = cache
        self._grads, self._exp_avg, self._exp_avg_sq = (self._like_adapter() for _ in range(3))
        self._plan = adapter.activation_plan(decoder.config.shape, max_recompute_share)
        self._cursors: tuple[BackwardCursor, ...] = ()

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

    def _sequence(self, item: TrainingSlice) -> TrainingSequence:
        return TrainingSequence(item, self._decoder, self._plan, dropout=self.adapter.spec.dropout, seed=self._seed)

    def _is_through(self) -> bool:
        if not all(cursor.is_done for cursor in self.cursors()):
            return False
        self._cursors = ()
        return True

    def artifact(self) -> bytes:
        """The adapter as PEFT's file."""
        return self.adapter.to_safetensors()

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
        step, seed = (number(tensors, name, what) for name in ("step", "seed"))
        if step < 0:
            raise InvalidAdapterError(f"{what}: step is {step}")
        state = self._state()
        for prefix, weights in state.items():
            own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            weights.copy_from(own, what)
        self._resume_at(step, seed)

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

    def _optimize(self, optimizer: OptimizerStep) -> float:
        grad_norm = float(ops.clip_grad_norm([self._grads.flat], optimizer.max_grad_norm))
        self._check_finite("gradient norm", grad_norm)
        self._update(optimizer)
        self._grads.flat.zero_()
        return grad_norm

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
