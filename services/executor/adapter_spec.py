"""What may be asked of an adapter, and the sizes that follow. Knows specifications and linears; no weight, no tensor."""

from __future__ import annotations

import math

from common.bypasses import Bypass
from common.messages import LoraSpec
from common.peft_folder import BOTTLENECK_TARGETS, NON_LINEARITIES
from services.executor.model_config import ModelConfig

MODULES = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}
"""The decoder's linears: PEFT's block of each, and the targets whose outputs lie side by side in it."""
TARGETS = tuple(target for _, targets in MODULES.values() for target in targets)
INPUT_SCALED = ("o_proj", "down_proj")
"""Targets whose input (IA)3 may scale: the others read theirs together."""


class InvalidAdapterError(ValueError):
    """The adapter does not fit its specification or the base model; the message names the field or tensor."""


def check_rank(spec: LoraSpec, max_rank: int, where: str) -> None:
    """Raises InvalidAdapterError, beginning with `where`, for a higher rank; (IA)3 has none."""
    if spec.method != "ia3" and spec.rank > max_rank:
        raise InvalidAdapterError(f"{where}rank {spec.rank} is over max_lora_rank {max_rank}")


def check_spec(spec: LoraSpec) -> None:
    """Raises InvalidAdapterError for a specification that no adapter can have."""
    if spec.rank < 1:
        raise InvalidAdapterError(f"rank must be at least 1, not {spec.rank}")
    if not (math.isfinite(spec.alpha) and spec.alpha > 0):
        raise InvalidAdapterError(f"alpha must be positive, not {spec.alpha}")
    if not 0.0 <= spec.dropout < 1.0:
        raise InvalidAdapterError(f"dropout must be at least 0 and below 1, not {spec.dropout}")
    unknown = sorted(set(spec.target_modules) - set(TARGETS))
    if unknown or not spec.target_modules:
        raise InvalidAdapterError(f"target_modules must be some of {', '.join(TARGETS)}, not {', '.join(unknown) or 'none'}")
    _check_feedforward(spec)
    _check_bottleneck(spec)


def _check_feedforward(spec: LoraSpec) -> None:
    scaled = set(spec.feedforward_modules)
    if scaled and spec.method != "ia3":
        raise InvalidAdapterError("feedforward_modules belong to the method ia3")
    if other := sorted(scaled - set(spec.target_modules)):
        raise InvalidAdapterError(f"feedforward_modules must be among target_modules; {', '.join(other)} is not")
    if other := sorted(scaled - set(INPUT_SCALED)):
        raise InvalidAdapterError(f"feedforward_modules may be {', '.join(INPUT_SCALED)}, not {', '.join(other)}")


def _check_bottleneck(spec: LoraSpec) -> None:
    if spec.method != "bottleneck":
        if spec.non_linearity:
            raise InvalidAdapterError("non_linearity belongs to the method bottleneck")
        return
    if spec.non_linearity not in NON_LINEARITIES:
        raise InvalidAdapterError(f"non_linearity must be {' or '.join(NON_LINEARITIES)}, not {spec.non_linearity!r}")
    if other := sorted(set(spec.target_modules) - set(BOTTLENECK_TARGETS)):
        allowed = ", ".join(BOTTLENECK_TARGETS)
        raise InvalidAdapterError(f"target_modules of a bottleneck adapter may be {allowed}, not {', '.join(other)}")


def bypass_of(spec: LoraSpec, target: str) -> Bypass:
    """What the adapter is around this target, as activation plans have it."""
    if spec.method == "lora":
        return Bypass(method="lora", target=target, rank=spec.rank)
    if spec.method == "bottleneck":
        return Bypass(method="bottleneck", target=target, rank=spec.rank, activation=spec.non_linearity)
    return Bypass(method="ia3_input" if target in spec.feedforward_modules else "ia3_output", target=target)


def num_weights(spec: LoraSpec, target: str, num_out: int, num_in: int) -> int:
    """Of one target in one layer."""
    if spec.method == "lora":
        return spec.rank * (num_in + num_out)
    if spec.method == "bottleneck":
        return 2 * spec.rank * num_out
    return num_in if target in spec.feedforward_modules else num_out


def target_widths(config: ModelConfig) -> list[list[int]]:
    """Output features of the targets that lie side by side in each of MODULES."""
    return [[target_shapes(config)[target][0] for target in targets] for _, targets in MODULES.values()]


def target_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Output and input features of every target."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, k, v = config.qkv_sizes
    return {
        "q_proj": (q, hidden),
        "k_proj": (k, hidden),
        "v_proj": (v, hidden),
        "o_proj": (hidden, q),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
