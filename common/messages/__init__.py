"""Every type that crosses the bus: frozen, tagged with its version, validated on arrival. Knows no subject and no transport.

Times are unix seconds (`_at`) or milliseconds (`_ms`). Token ids are ints of the base model's vocabulary.
"""

from common.messages.adapters import AdapterChecked, AdapterRecord, CheckAdapter
from common.messages.beats import Beat, ExecutorLoad, LatencyProfile, Role, ServiceState
from common.messages.errors import ErrorReply
from common.messages.inference import (
    MAX_CONSTRAINT_CHARS,
    MAX_LOGIT_BIAS,
    MAX_SALT_CHARS,
    MAX_TOP_LOGPROBS,
    Admit,
    Admitted,
    Cancel,
    Constraint,
    FinishReason,
    InferenceRequest,
    Logprobs,
    Rejected,
    RejectReason,
    Sampling,
    Slo,
    TokenChunk,
    Usage,
)
from common.messages.jobs import (
    CheckpointPage,
    CreateJob,
    EventPage,
    FineTuningJob,
    JobCheckpoint,
    JobError,
    JobEvent,
    JobPage,
    JobQuery,
    JobStatus,
)
from common.messages.speculation import (
    DraftTree,
    DraftTrees,
    IterationReport,
    OpenedSequence,
    PlannerClaim,
    PlannerGranted,
    SequenceProgress,
)
from common.messages.training import (
    CheckpointWritten,
    CloseJob,
    DrafterSpec,
    EvaluationSlice,
    JobClosed,
    JobFailed,
    JobOpened,
    LoraSpec,
    OpenJob,
    OptimizerStep,
    SequenceEvaluated,
    SliceAccepted,
    StepDone,
    TrainingSlice,
    WriteCheckpoint,
)

Message = (
    InferenceRequest | Admit | Admitted | Rejected | TokenChunk | Cancel | Beat
    | PlannerClaim | PlannerGranted | IterationReport | DraftTrees
    | OpenJob | JobOpened | TrainingSlice | SliceAccepted | StepDone | JobFailed | WriteCheckpoint | CheckpointWritten
    | CloseJob | JobClosed | AdapterRecord | CheckAdapter | AdapterChecked
    | CreateJob | JobQuery | FineTuningJob | JobPage | EventPage | CheckpointPage | ErrorReply
)  # fmt: skip
"""All that can be the body of a bus message."""

__all__ = [
    "MAX_CONSTRAINT_CHARS",
    "MAX_LOGIT_BIAS",
    "MAX_SALT_CHARS",
    "MAX_TOP_LOGPROBS",
    "AdapterChecked",
    "AdapterRecord",
    "Admit",
    "Admitted",
    "Beat",
    "Cancel",
    "CheckAdapter",
    "CheckpointPage",
    "CheckpointWritten",
    "CloseJob",
    "Constraint",
    "CreateJob",
    "DraftTree",
    "DraftTrees",
    "DrafterSpec",
    "ErrorReply",
    "EvaluationSlice",
    "EventPage",
    "ExecutorLoad",
    "FineTuningJob",
    "FinishReason",
    "InferenceRequest",
    "IterationReport",
    "JobCheckpoint",
    "JobClosed",
    "JobError",
    "JobEvent",
    "JobFailed",
    "JobOpened",
    "JobPage",
    "JobQuery",
    "JobStatus",
    "LatencyProfile",
    "Logprobs",
    "LoraSpec",
    "Message",
    "OpenJob",
    "OpenedSequence",
    "OptimizerStep",
    "PlannerClaim",
    "PlannerGranted",
    "RejectReason",
    "Rejected",
    "Role",
    "Sampling",
    "SequenceEvaluated",
    "SequenceProgress",
    "ServiceState",
    "SliceAccepted",
    "Slo",
    "StepDone",
    "TokenChunk",
    "TrainingSlice",
    "Usage",
    "WriteCheckpoint",
]
