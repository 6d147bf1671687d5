"""What a user may ask of a finetuning job, with ranges and defaults. Pure; knows no job and no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from common.messages import ErrorReply, LoraSpec
from common.peft_folder import BOTTLENECK_TARGETS
from common.validation import find_fault
from services.trainer.drafter_options import (
    DEFAULT_DRAFTER_LEARNING_RATE,
    Distillation,
    DistillationHyperparameters,
    DrafterOptions,
    Hyperparameters,
    drafter_options,
)

T = TypeVar("T")
Scheduler = Literal["constant", "linear", "cosine"]
Optimizer = Literal["adamw", "sgd"]
TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ScaledInput = Literal["o_proj", "down_proj"]
NonLinearity = Literal["relu", "gelu"]

ALL_LINEAR = LoraSpec().target_modules
IA3_TARGETS, IA3_FEEDFORWARD = ("k_proj", "v_proj", "down_proj"), ("down_proj",)
"""What (IA)3 scales by default, as in its paper (Liu et al. 2022) and in PEFT."""
DEFAULT_EPOCHS = 3
DEFAULT_BATCH_SIZE = 4
DEFAULT_LEARNING_RATE = 2e-4
"""Multiplied by learning_rate_multiplier, whose "auto" is 1."""
DEFAULT_IA3_LEARNING_RATE = 3e-3
"""Of its paper: a vector is far from where it must go, and there are few of them."""


class ApiError(Exception):
    """A refusal in OpenAI's words: `status` is the HTTP status, `param` the field at fault."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.reply = ErrorReply(status=status, message=message, code=code, param=param)


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it will run: every default filled in."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int
    metadata: dict[str, str] | None = None
    n_epochs: int = DEFAULT_EPOCHS
    batch_size: int = DEFAULT_BATCH_SIZE
    learning_rate_multiplier: float = 1.0
    lora: LoraSpec = LoraSpec()
    drafter: DrafterOptions | None = None
    """What is trained in place of an adapter."""
    base_learning_rate: float = DEFAULT_LEARNING_RATE
    optimizer: Optimizer = "adamw"
    momentum: float = 0.0
    scheduler: Scheduler = "linear"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return self.base_learning_rate * self.learning_rate_multiplier


class _Supervised(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    hyperparameters: Hyperparameters | None = None


class _Method(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["supervised", "distillation"] = "supervised"
    supervised: _Supervised | None = None
    distillation: Distillation | None = None


class _Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`method` rslora scales by alpha / sqrt(rank); ia3 has `feedforward_modules`, but no rank, alpha or dropout; bottleneck
    has a rank, its size, and a `non_linearity`, but no alpha; `momentum` is of the optimizer sgd.
    """

    method: Literal["lora", "rslora", "ia3", "bottleneck"] = "lora"
    rank: Annotated[int, Meta(ge=1, le=256)] | UnsetType = UNSET
    alpha: Annotated[float, Meta(gt=0, le=100_000)] | UnsetType = UNSET
    dropout: Annotated[float, Meta(ge=0, lt=1)] | UnsetType = UNSET
    target_modules: Annotated[list[TargetModule], Meta(min_length=1)] | Literal["all-linear"] | UnsetType = UNSET
    feedforward_modules: list[ScaledInput] | UnsetType = UNSET
    non_linearity: NonLinearity | UnsetType = UNSET
    learning_rate: Annotated[float, Meta(gt=0, le=10)] | UnsetType = UNSET
    optimizer: Optimizer = "adamw"
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    scheduler: Scheduler = "linear"
    warmup_steps: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    max_grad_norm: Annotated[float, Meta(ge=0, le=1_000_000)] = 1.0
    weight_decay: Annotated[float, Meta(ge=0, le=1)] = 0.0


class _CreateBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An option that we do not know is an error in every part of the body, not a silent default."""

    model: Annotated[str, Meta(min_length=1)]
    training_file: Annotated[str, Meta(min_length=1)]
    validation_file: Annotated[str, Meta(min_length=1)] | None = None
    suffix: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    metadata: (
        Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None
    ) = None
    integrations: Annotated[list[Any], Meta(max_length=0)] | None = None
    method: _Method | None = None
    hyperparameters: Hyperparameters | None = None
    lora: _Lora | None = None


def parse_create(body: dict[str, Any], new_seed: int) -> JobSpec:
    """The job that this JSON body asks for; `new_seed` is used when it names none. Raises ApiError 400."""
    try:
        asked = msgspec.convert(body, _CreateBody)
    except msgspec.ValidationError as error:
        fault = find_fault(error, _CreateBody)
        raise ApiError(400, str(fault), "invalid_value", fault.param or None) from error
    method = asked.method or _Method()
    if method.type == "distillation":
        return _distillation(asked, method, new_seed)
    if method.distillation is not None:
        raise _wrong_method("method.distillation", "supervised")
    return _resolve(asked, _hyperparameters(asked), asked.lora or _Lora(), new_seed)


def job_lora(spec: JobSpec) -> dict[str, Any]:
    """The resolved `lora` block, as a job shows it; empty if it trains a drafter."""
    if spec.drafter is not None:
        return {}
    lora = spec.lora
    adapter: dict[str, Any] = {"method": "rslora" if lora.use_rslora else lora.method}
    if lora.method == "ia3":
        adapter["feedforward_modules"] = list(lora.feedforward_modules)
    elif lora.method == "bottleneck":
        adapter |= {"rank": lora.rank, "non_linearity": lora.non_linearity, "dropout": lora.dropout}
    else:
        adapter |= {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout}
    return {
        **adapter,
        "target_modules": list(lora.target_modules),
        "learning_rate": spec.base_learning_rate,
        "optimizer": spec.optimizer,
        "momentum": spec.momentum,
        "scheduler": spec.scheduler,
        "warmup_steps": spec.warmup_steps,
        "max_grad_norm": spec.max_grad_norm,
        "weight_decay": spec.weight_decay,
    }


def job_hyperparameters(spec: JobSpec) -> dict[str, Any]:
    """The resolved hyperparameters, as a job shows them."""
    hyper: dict[str, Any] = {
        "n_epochs": spec.n_epochs,
        "batch_size": spec.batch_size,
        "learning_rate_multiplier": spec.learning_rate_multiplier,
    }
    if spec.drafter is not None:
        hyper |= {"learning_rate": spec.base_learning_rate, **msgspec.structs.asdict(spec.drafter)}
    return hyper


def _distillation(asked: _CreateBody, method: _Method, new_seed: int) -> JobSpec:
    """A job that trains a drafter: what belongs to adapters is refused."""
    for field in ("lora", "suffix", "hyperparameters"):
        if getattr(asked, field) is not None:
            raise _wrong_method(field, "distillation")
    if method.supervised is not None:
        raise _wrong_method("method.supervised", "distillation")
    hyper = (method.distillation or Distillation()).hyperparameters or DistillationHyperparameters()
    rate = DEFAULT_DRAFTER_LEARNING_RATE if hyper.learning_rate == "auto" else hyper.learning_rate
    spec = _resolve(asked, hyper, _Lora(), new_seed)
    return msgspec.structs.replace(spec, drafter=drafter_options(hyper), base_learning_rate=rate)


def _wrong_method(field: str, method: str) -> ApiError:
    return ApiError(400, f"{field}: does not belong to the method {method}", "invalid_value", field)


def _resolve(asked: _CreateBody, hyper: Hyperparameters, lora: _Lora, new_seed: int) -> JobSpec:
    if lora.momentum and lora.optimizer != "sgd":
        raise ApiError(400, "lora.momentum: belongs to the optimizer sgd", "invalid_value", "lora.momentum")
    return JobSpec(
        model=asked.model,
        training_file=asked.training_file,
        validation_file=asked.validation_file,
        suffix=asked.suffix,
        seed=new_seed if asked.seed is None else asked.seed,
        metadata=asked.metadata,
        n_epochs=DEFAULT_EPOCHS if hyper.n_epochs == "auto" else hyper.n_epochs,
        batch_size=DEFAULT_BATCH_SIZE if hyper.batch_size == "auto" else hyper.batch_size,
        learning_rate_multiplier=1.0 if hyper.learning_rate_multiplier == "auto" else hyper.learning_rate_multiplier,
        lora={"ia3": _ia3, "bottleneck": _bottleneck}.get(lora.method, _low_rank)(lora),
        base_learning_rate=_given(
            lora.learning_rate, DEFAULT_IA3_LEARNING_RATE if lora.method == "ia3" else DEFAULT_LEARNING_RATE
        ),
        optimizer=lora.optimizer,
        momentum=lora.momentum,
        scheduler=lora.scheduler,
        warmup_steps=lora.warmup_steps,
        max_grad_norm=lora.max_grad_norm,
        weight_decay=lora.weight_decay,
    )


def _given(value: T | UnsetType, default: T) -> T:
    return default if value is UNSET else value


def _targets(asked: Sequence[str] | UnsetType, default: tuple[str, ...]) -> tuple[str, ...]:
    chosen = ALL_LINEAR if asked == "all-linear" else _given(asked, default)
    return tuple(name for name in ALL_LINEAR if name in chosen)


def _low_rank(lora: _Lora) -> LoraSpec:
    _refuse(lora, "feedforward_modules", "non_linearity")
    usual = LoraSpec()
    return LoraSpec(
        rank=_given(lora.rank, usual.rank),
        alpha=_given(lora.alpha, usual.alpha),
        target_modules=_targets(lora.target_modules, ALL_LINEAR),
        use_rslora=lora.method == "rslora",
        dropout=_given(lora.dropout, usual.dropout),
    )


def _ia3(lora: _Lora) -> LoraSpec:
    _refuse(lora, "rank", "alpha", "dropout", "non_linearity")
    targets = _targets(lora.target_modules, IA3_TARGETS)
    usual = tuple(name for name in IA3_FEEDFORWARD if name in targets)
    scaled = _targets(lora.feedforward_modules, usual)
    if missing := sorted(set(scaled) - set(targets)):
        raise _misplaced("feedforward_modules", f"must be among target_modules; {', '.join(missing)} is not")
    return LoraSpec(method="ia3", target_modules=targets, feedforward_modules=scaled)


def _bottleneck(lora: _Lora) -> LoraSpec:
    _refuse(lora, "alpha", "feedforward_modules")
    targets = _targets(lora.target_modules, BOTTLENECK_TARGETS)
    if other := [name for name in targets if name not in BOTTLENECK_TARGETS]:
        raise _misplaced("target_modules", f"of the method bottleneck may be {', '.join(BOTTLENECK_TARGETS)}, not {other[0]}")
    usual = LoraSpec()
    return LoraSpec(
        method="bottleneck",
        rank=_given(lora.rank, usual.rank),
        non_linearity=_given(lora.non_linearity, "relu"),
        target_modules=targets,
        dropout=_given(lora.dropout, usual.dropout),
    )


def _refuse(lora: _Lora, *fields: str) -> None:
    for field in fields:
        if getattr(lora, field) is not UNSET:
            raise _misplaced(field, f"does not belong to the method {lora.method}")


def _misplaced(field: str, problem: str) -> ApiError:
    return ApiError(400, f"lora.{field}: {problem}", "invalid_value", f"lora.{field}")


def _hyperparameters(asked: _CreateBody) -> Hyperparameters:
    """From `method`, or from the deprecated top level; both at once is ambiguous."""
    supervised = asked.method.supervised if asked.method else None
    nested = supervised.hyperparameters if supervised else None
    if nested is not None and asked.hyperparameters is not None:
        raise ApiError(
            400, "give hyperparameters either in method.supervised or at the top level", "invalid_value", "hyperparameters"
        )
    return nested or asked.hyperparameters or Hyperparameters()
