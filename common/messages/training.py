"""What a trainer and an executor say to each other: a job's slices, its steps and its checkpoints."""

from __future__ import annotations

import math
from typing import Literal

import msgspec


class LoraSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter's shape, in PEFT's words.

    lora: y += scale * dropout(x) A^T B^T on each target linear; `dropout` (a probability) matters in training only.
    bottleneck: y += up(non_linearity(down dropout(y))) on each target linear's output, `rank` wide; there is no alpha.
    ia3: y *= l, or for targets in `feedforward_modules` x *= l, with a vector l per target; there is no rank, alpha or dropout.
    """

    method: Literal["lora", "ia3", "bottleneck"] = "lora"
    feedforward_modules: tuple[str, ...] = ()
    non_linearity: Literal["", "relu", "gelu"] = ""
    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    use_rslora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """alpha / rank, or with rsLoRA (Kalajdzievski 2023) alpha / sqrt(rank); what else there is has none."""
        if self.method != "lora":
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class DrafterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A drafter in training: the head on the target's hidden states that a planner's `features` drafter runs (EAGLE's).

    It can draft the tokens of `vocabulary`, rising ids, and is trained `num_steps` tokens ahead, on its own outputs after the
    first. The first `start_steps` optimizer steps train nothing: their texts give the head's first weights, by least squares.
    """

    vocabulary: tuple[int, ...]
    num_steps: int = 3
    start_steps: int = 0


class OpenJob(msgspec.Struct, frozen=True, kw_only=True, tag="open_job.1"):
    """Trainer's order: hold adapter and optimizer of this job. `lease` fences: a higher lease replaces the job's state.

    With `drafter` the job trains that in place of an adapter, from hidden states of the frozen model (distillation).
    With `checkpoint` (an artifact's name) adapter, moments and step are restored from it; else B starts at zero. All that is
    random, the first A and what dropout drops, depends on `seed` and the step, so that a restored job goes on to the bit.
    """

    job_id: str
    lease: int
    base_model: str
    lora: LoraSpec = LoraSpec()
    drafter: DrafterSpec | None = None
    seed: int = 0
    checkpoint: str | None = None


class JobOpened(msgspec.Struct, frozen=True, kw_only=True, tag="job_opened.1"):
    """The executor holds the job; its next optimizer step has number `step` (0 for a new job)."""

    job_id: str
    executor_id: str
    step: int


class OptimizerStep(msgspec.Struct, frozen=True, kw_only=True):
    """One update, torch.optim's AdamW or SGD, after clipping the global gradient norm; max_grad_norm 0: no clipping.

    `momentum` is SGD's, betas and eps are AdamW's.
    """

    learning_rate: float
    method: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class TrainingSlice(msgspec.Struct, frozen=True, kw_only=True, tag="slice.1"):
    """One sequence of a step. `weights[i]` is the loss weight of predicting `tokens[i]` (weights[0] is unused and 0).

    The step's loss is the sum of weight * cross entropy over all its slices, so weights are normalised by the trainer.
    The slice with `optimizer` is the last of its step. Delivery is idempotent by (job, step, index).
    """

    job_id: str
    lease: int
    step: int
    index: int
    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    optimizer: OptimizerStep | None = None


class EvaluationSlice(msgspec.Struct, frozen=True, kw_only=True, tag="evaluation_slice.1"):
    """One sequence to be scored under the adapter, or by the drafter, as it is before step `step`.

    It changes nothing, so it may be asked again. `weights` as in TrainingSlice.
    """

    job_id: str
    lease: int
    step: int
    index: int
    tokens: tuple[int, ...]
    weights: tuple[float, ...]


class SequenceEvaluated(msgspec.Struct, frozen=True, kw_only=True, tag="sequence_evaluated.1"):
    """The score of an EvaluationSlice: the weighted sum of its losses, and hits of its tokens that have a weight.

    A drafter's hits are first guesses that are the model's favourite; it guesses no text's second token.
    """

    job_id: str
    lease: int
    step: int
    index: int
    loss: float
    num_correct: int
    num_tokens: int


class SliceAccepted(msgspec.Struct, frozen=True, kw_only=True, tag="slice_accepted.1"):
    """The slice is in the executor's queue."""

    job_id: str
    step: int
    index: int


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag="step_done.1"):
    """An optimizer step was applied. `loss` is weighted as in TrainingSlice; `num_tokens` have a non-zero weight."""

    job_id: str
    lease: int
    step: int
    loss: float
    grad_norm: float
    num_correct: int
    num_tokens: int
    num_sequence_tokens: int
    elapsed_ms: float


class JobFailed(msgspec.Struct, frozen=True, kw_only=True, tag="job_failed.1"):
    """The executor gave the job up (for example: the loss is not finite); its state there is gone."""

    job_id: str
    lease: int
    message: str


class WriteCheckpoint(msgspec.Struct, frozen=True, kw_only=True, tag="write_checkpoint.1"):
    """Write adapter and optimizer state after the steps done so far to the artifact `artifact` in the object store."""

    job_id: str
    lease: int
    artifact: str


class CheckpointWritten(msgspec.Struct, frozen=True, kw_only=True, tag="checkpoint_written.1"):
    """The artifact is stored; it holds the state before step `step`. `steps` are the last ones before it, newest last.

    Who asks may have missed some of them while the server was away.
    """

    job_id: str
    artifact: str
    step: int
    num_bytes: int
    steps: tuple[StepDone, ...] = ()


class CloseJob(msgspec.Struct, frozen=True, kw_only=True, tag="close_job.1"):
    """Forget the job; unknown jobs are not an error."""

    job_id: str
    lease: int


class JobClosed(msgspec.Struct, frozen=True, kw_only=True, tag="job_closed.1"):
    """The executor holds nothing of this job any more."""

    job_id: str
