"""What a user may ask of a drafter's distillation, with ranges and defaults. Pure; knows no job and no file."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Auto = Literal["auto"]
DEFAULT_DRAFTER_LEARNING_RATE = 4e-4
DEFAULT_VOCABULARY = 10_240
DEFAULT_STEPS = 3


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's."""

    n_epochs: Annotated[int, Meta(ge=1, le=50)] | Auto = "auto"
    batch_size: Annotated[int, Meta(ge=1, le=256)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Meta(gt=0, le=10_000)] | Auto = "auto"


class DistillationHyperparameters(Hyperparameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Besides: how many of the model's tokens the drafter can say, and how many tokens ahead it is trained."""

    learning_rate: Annotated[float, Meta(gt=0, le=1)] | Auto = "auto"
    vocabulary_size: Annotated[int, Meta(ge=16, le=262_144)] | Auto = "auto"
    num_steps: Annotated[int, Meta(ge=1, le=6)] | Auto = "auto"


class Distillation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the method."""

    hyperparameters: DistillationHyperparameters | None = None


class DrafterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """A drafter as it will be trained: every default filled in."""

    vocabulary_size: int
    num_steps: int


def drafter_options(asked: DistillationHyperparameters) -> DrafterOptions:
    """The drafter that is asked for."""
    return DrafterOptions(
        vocabulary_size=DEFAULT_VOCABULARY if asked.vocabulary_size == "auto" else asked.vocabulary_size,
        num_steps=DEFAULT_STEPS if asked.num_steps == "auto" else asked.num_steps,
    )
