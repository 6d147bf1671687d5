"""Every type that crosses the bus: frozen, tagged with its version, validated on arrival. Knows no subject and no transport.

Times are unix seconds (`_at`) or milliseconds (`_ms`). Token ids are ints of the base model's vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Role = Literal["gateway", "admission", "planner", "executor", "trainer"]
ServiceState = Literal["starting", "ready", "draining"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
RejectReason = Literal[
    "overloaded", "no_executor", "unknown_model", "too_long", "invalid", "duplicate", "stale_lease", "not_found", "draining"
]
MAX_SALT_CHARS = 256
JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """Latency targets of one request; None means best effort."""

    tpot_ms: float | None = None
    ttft_ms: float | None = None


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn. `temperature` 0 is greedy; random numbers are a function of (seed, position).

    Order: min_tokens, logit_bias, penalties, temperature, min_p, top_k, top_p. `logit_bias` are pairs of token and bias.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    """So many output tokens come before any that ends the request."""
    seed: int = 0


MAX_LOGIT_BIAS = 1024
"""Tokens that one request may bias."""
MAX_TOP_LOGPROBS = 20
"""Alternatives per token whose log probabilities a request may ask for."""
MAX_CONSTRAINT_CHARS = 65536
"""Longest text of a constraint."""


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What the whole output must be: JSON after a schema, any JSON object (`text` is empty), a full match of a regex, one of a
    JSON list of strings, or a word of a grammar (Lark or GBNF).
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    text: str = ""


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True, tag="infer.1"):
    """A tokenized request. The last `num_generated` prompt tokens are output of an earlier executor that died.

    `max_tokens` counts all output, those tokens included.
    """

    request_id: str
    model: str
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    slo: Slo = Slo()
    constraint: Constraint | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    num_generated: int = 0
    logprobs: int | None = None
    """Log probabilities of each output token and of so many of the most probable ones; None: of none."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, its first and the `num_generated` last ones excepted: all its rows are computed."""
    priority: int = 0
    """Lower is prefilled earlier."""
    arrived_at: float = 0.0
    cache_salt: str = ""
    """Only requests with the same salt share cached keys and values."""
    gateway_id: str = ""
    """The gateway that takes the tokens: when it dies, the request ends. Empty: whoever asked, it runs to its end."""
    base_model: str = ""
    """The base model of an adapter: executors that serve it load the adapter if need be. Empty: `model` is what they list."""


class Admit(msgspec.Struct, frozen=True, kw_only=True, tag="admit.1"):
    """Admission's order to one executor: run this request; its first token is due at `first_token_due_at` (0: no target)."""

    request: InferenceRequest
    first_token_due_at: float = 0.0


class Admitted(msgspec.Struct, frozen=True, kw_only=True, tag="admitted.1"):
    """The request runs on this executor; its tokens arrive on `stream.<request_id>`."""

    request_id: str
    executor_id: str
    best_effort: bool = False


class Rejected(msgspec.Struct, frozen=True, kw_only=True, tag="rejected.1"):
    """A typed refusal. `reason` is the wire code; `retry_after_ms` 0 means that retrying cannot help."""

    reason: RejectReason
    message: str
    retry_after_ms: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one request on one executor; `verify_steps` is the number of its decode iterations."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    verify_steps: int = 0
    decode_ms: float = 0.0


class Logprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities of consecutive tokens under the unprocessed distribution; a probability of zero is -9999.

    `chosen[i]` is token i's own; its `num_top` most probable alternatives, best first, are at i * num_top of the other two.
    """

    chosen: tuple[float, ...]
    num_top: int = 0
    top_tokens: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class TokenChunk(msgspec.Struct, frozen=True, kw_only=True, tag="chunk.1"):
    """Tokens committed in one iteration. `seq` counts from 0 without gaps; the last chunk has a finish reason and usage.

    `logprobs` are of its tokens. `prompt_logprobs` come before the first token, in chunks of their own, in the prompt's order.
    """

    request_id: str
    seq: int
    tokens: tuple[int, ...] = ()
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None
    executor_id: str = ""


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel.1"):
    """Stop this request and free its pages; an unknown request is not an error."""

    request_id: str


class LatencyProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Measured cost of an iteration: `points` are (tokens, ms), rising in both; see `common.latency`."""

    points: tuple[tuple[int, float], ...]
    ms_per_context_token: float = 0.0
    ms_per_row_context: float = 0.0
    """Of one row's attention to one token of its context; 0 in profiles of a time that did not measure it."""
    backward_ms_per_token: float = 0.0
    correction: float = 1.0


class ExecutorLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What admission needs to know of one executor."""

    model: str
    adapters: tuple[str, ...]
    max_model_len: int
    page_size: int
    num_pages: int
    free_pages: int
    num_running: int
    num_waiting: int
    waiting_prefill_tokens: int
    context_tokens: int
    promised_tpot_ms: tuple[float, ...]
    latency: LatencyProfile
    planner_id: str = ""
    """Who drafts for it."""
    max_training_tokens: int = 0
    """Longest training sequence that it takes; 0: unknown."""
    max_loras: int = 0
    """Adapters that can be resident; `adapters` are those that are, the one used longest ago first."""
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    """Of requests that decode, and of those before their first token."""


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag="beat.1"):
    """A heartbeat. A peer is dead after three missed periods. `counters` only grow; `gauges` are the load of this moment."""

    role: Role
    instance_id: str
    state: ServiceState
    sent_at: float
    period_s: float
    url: str = ""
    counters: dict[str, float] = {}
    gauges: dict[str, float] = {}
    executor: ExecutorLoad | None = None


# --- speculation: executor <-> planner ---------------------------------------------------------------------------------


class PlannerClaim(msgspec.Struct, frozen=True, kw_only=True, tag="claim.1"):
    """An executor asks who drafts for it."""

    executor_id: str
    model: str


class PlannerGranted(msgspec.Struct, frozen=True, kw_only=True, tag="granted.1"):
    """This planner drafts for the executor that asked."""

    planner_id: str


class OpenedSequence(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that starts to decode, or that a new planner has not seen: all its tokens so far.

    `num_decoded` of its tokens came since its first one on this executor, the start of SequenceProgress.decode_ms; None: all
    output but the first, which prefill gives.
    """

    request_id: str
    tokens: tuple[int, ...]
    num_output: int
    max_output: int
    tpot_ms: float | None = None
    num_decoded: int | None = None


class SequenceProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What one verify step did to a sequence. `tokens` were committed by it (bonus token included)."""

    request_id: str
    tokens: tuple[int, ...]
    num_drafted: int
    accepted_len: int
    num_output: int
    decode_ms: float


class IterationReport(msgspec.Struct, frozen=True, kw_only=True, tag="report.1"):
    """The state of an executor's decoding after iteration `iteration`: the planner answers with DraftTrees of that number.

    `token_budget` is the number of draft nodes (roots excluded) that the next iteration may hold; `t_spec_ms` its predicted
    latency (AdaServe section 3, the t_spec of formula 2); `base_tokens` are the roots and other tokens that it holds anyway.
    """

    executor_id: str
    iteration: int
    opened: tuple[OpenedSequence, ...] = ()
    closed: tuple[str, ...] = ()
    progress: tuple[SequenceProgress, ...] = ()
    token_budget: int
    base_tokens: int
    t_spec_ms: float
    latency: LatencyProfile


class DraftTree(msgspec.Struct, frozen=True, kw_only=True):
    """A draft tree in BFS order: node 0 is the last committed token, `parents[0]` is -1 and `parents[i] < i`.

    `length` is the number of committed tokens it continues; `probs[i]` the probability that the path to node i is accepted;
    `num_required` of its nodes were chosen for the request's SLO (node 0 excluded).
    """

    request_id: str
    length: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    probs: tuple[float, ...]
    num_required: int = 0


class DraftTrees(msgspec.Struct, frozen=True, kw_only=True, tag="trees.1"):
    """The planner's answer to the report of iteration `iteration`; a sequence without a tree decodes its root alone."""

    planner_id: str
    iteration: int
    trees: tuple[DraftTree, ...] = ()
    draft_ms: float = 0.0
    unknown: tuple[str, ...] = ()
    """Sequences of the report that the planner cannot follow: the executor opens them again."""


# --- finetuning: trainer <-> executor ----------------------------------------------------------------------------------


class LoraSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter's shape, in PEFT's words: y += (alpha / rank) * x A^T B^T on each target linear."""

    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class OpenJob(msgspec.Struct, frozen=True, kw_only=True, tag="open_job.1"):
    """Trainer's order: hold adapter and optimizer of this job. `lease` fences: a higher lease replaces the job's state.

    With `checkpoint` (an artifact's name) adapter, moments and step are restored from it; else B starts at zero.
    """

    job_id: str
    lease: int
    base_model: str
    lora: LoraSpec
    seed: int = 0
    checkpoint: str | None = None


class JobOpened(msgspec.Struct, frozen=True, kw_only=True, tag="job_opened.1"):
    """The executor holds the job; its next optimizer step has number `step` (0 for a new job)."""

    job_id: str
    executor_id: str
    step: int


class OptimizerStep(msgspec.Struct, frozen=True, kw_only=True):
    """One AdamW update (torch.optim.AdamW's formula) after clipping the global gradient norm; max_grad_norm 0: no clipping."""

    learning_rate: float
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
    """The artifact is stored; it holds the state before step `step`."""

    job_id: str
    artifact: str
    step: int
    num_bytes: int


class CloseJob(msgspec.Struct, frozen=True, kw_only=True, tag="close_job.1"):
    """Forget the job; unknown jobs are not an error."""

    job_id: str
    lease: int


class JobClosed(msgspec.Struct, frozen=True, kw_only=True, tag="job_closed.1"):
    """The executor holds nothing of this job any more."""

    job_id: str


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True, tag="adapter.1"):
    """A servable adapter: entry of the KV bucket `heddle_adapters`. `artifact` holds adapter_model.safetensors' bytes."""

    name: str
    base_model: str
    artifact: str
    lora: LoraSpec
    created_at: float
    job_id: str = ""


class CheckAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="check_adapter.1"):
    """Could this adapter be served? Asked of any executor of its base model, when its artifact is stored and before its record.

    The answer is AdapterChecked or Rejected with the reason.
    """

    record: AdapterRecord


class AdapterChecked(msgspec.Struct, frozen=True, kw_only=True, tag="adapter_checked.1"):
    """The adapter fits the base model."""

    name: str


# --- finetuning API: anyone -> trainer ---------------------------------------------------------------------------------


class CreateJob(msgspec.Struct, frozen=True, kw_only=True, tag="create_job.1"):
    """The body of POST /v1/fine_tuning/jobs, as decoded from JSON; the trainer validates it."""

    body: dict[str, Any]


class JobQuery(msgspec.Struct, frozen=True, kw_only=True, tag="job_query.1"):
    """Get, cancel, pause, resume, or list events and checkpoints of one job, or list jobs (empty id)."""

    job_id: str = ""
    after: str = ""
    limit: int = 20


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job failed, in OpenAI's words."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(msgspec.Struct, frozen=True, kw_only=True, tag="job.1"):
    """A finetuning job as OpenAI's API shows it, plus our `lora` block and progress."""

    id: str
    created_at: int
    model: str
    training_file: str
    status: JobStatus
    hyperparameters: dict[str, Any]
    lora: dict[str, Any]
    seed: int
    finished_at: int | None = None
    fine_tuned_model: str | None = None
    error: JobError | None = None
    trained_tokens: int | None = None
    validation_file: str | None = None
    suffix: str | None = None
    metadata: dict[str, str] | None = None
    estimated_finish: int | None = None
    result_files: tuple[str, ...] = ()
    step: int = 0
    total_steps: int = 0


class JobPage(msgspec.Struct, frozen=True, kw_only=True, tag="job_page.1"):
    """A page of jobs, newest first."""

    data: tuple[FineTuningJob, ...]
    has_more: bool = False


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a job; `type` metrics carries step, train_loss and so on in `data`."""

    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = {}


class EventPage(msgspec.Struct, frozen=True, kw_only=True, tag="event_page.1"):
    """A page of a job's events, newest first."""

    data: tuple[JobEvent, ...]
    has_more: bool = False


class JobCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One stored checkpoint of a job."""

    id: str
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float] = {}


class CheckpointPage(msgspec.Struct, frozen=True, kw_only=True, tag="checkpoint_page.1"):
    """A page of a job's checkpoints, newest first."""

    data: tuple[JobCheckpoint, ...]
    has_more: bool = False


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True, tag="error.1"):
    """A typed error: `status` is the HTTP status that it maps to, `code` and `param` are OpenAI's."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None


Message = (
    InferenceRequest | Admit | Admitted | Rejected | TokenChunk | Cancel | Beat
    | PlannerClaim | PlannerGranted | IterationReport | DraftTrees
    | OpenJob | JobOpened | TrainingSlice | SliceAccepted | StepDone | JobFailed | WriteCheckpoint | CheckpointWritten
    | CloseJob | JobClosed | AdapterRecord | CheckAdapter | AdapterChecked
    | CreateJob | JobQuery | FineTuningJob | JobPage | EventPage | CheckpointPage | ErrorReply
)  # fmt: skip
"""All that can be the body of a bus message."""
