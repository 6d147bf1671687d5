"""The bypass networks of a PEFT configuration: which linears of which layers they join, and how. Knows no tensor and no weight.

A bypass reads one tensor of the frozen backbone and adds to one (FlexLLM 4): Y := f_backbone(X) + f_bypass(X).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.model_shape import ModelShape
from common.peft_folder import CONFIG, REFUSED, TARGETS, PeftFolderError

Method = Literal["lora", "ia3_output", "ia3_input", "bottleneck"]
ACTIVATIONS = ("relu", "tanh", "silu", "gelu")
LORA_DEFAULTS = ("q_proj", "v_proj")
IA3_DEFAULTS = ("k_proj", "v_proj", "down_proj")
IA3_INPUT_DEFAULTS = ("down_proj",)
"""What PEFT takes for the Llama family where target_modules or feedforward_modules is null."""
MAX_RANK = 4096


class BypassError(PeftFolderError):
    """The configuration asks for a bypass that is unknown or impossible; the message names the field."""


@dataclass(frozen=True, kw_only=True)
class Bypass:
    """One bypass around the linear `target`.

    lora: X A^T B^T from the linear's input to its output; `rank` is A's. (rsLoRA is LoRA with another scale.)
    ia3_output, ia3_input: X (w - 1), from the linear's output, or input, to itself.
    bottleneck: up(activation(down X)) from the linear's output to itself, `rank` wide: a serial adapter.
    """

    method: Method
    target: str
    rank: int = 0
    activation: str = ""


LayerBypasses = Mapping[str, Bypass]
"""The bypasses of one layer, by target."""


def read_bypasses(path: Path, shape: ModelShape) -> tuple[dict[str, Bypass], ...]:
    """The bypasses of each layer, from an adapter_config.json or the folder that has it. Raises BypassError."""
    path = path / CONFIG if path.is_dir() else path
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise BypassError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BypassError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BypassError(f"{path} is not a JSON object")
    try:
        return bypasses_of(config, shape)
    except BypassError as error:
        raise BypassError(f"{path}: {error}") from error


def bypasses_of(config: Mapping[str, Any], shape: ModelShape) -> tuple[dict[str, Bypass], ...]:
    """The bypasses of each layer, from the object of an adapter_config.json. Raises BypassError, naming the field."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in REGISTRY:
        raise BypassError(f"peft_type: must be one of {', '.join(REGISTRY)}, not {kind!r}")
    for field in (*REFUSED, "rank_pattern"):
        if config.get(field) and field != "layers_to_transform":
            raise BypassError(f"{field}: is not supported")
    layers = _layers(config.get("layers_to_transform"), shape.num_layers)
    found = tuple(REGISTRY[kind](config, layer) if layer in layers else {} for layer in range(shape.num_layers))
    if not any(found):
        raise BypassError(f"target_modules: {config.get('target_modules')!r} matches no linear of this model")
    return found


def _lora(config: Mapping[str, Any], layer: int) -> dict[str, Bypass]:
    rank = _rank(config, "r", 8)
    return {
        target: Bypass(method="lora", target=target, rank=rank)
        for target in _matching(config, "target_modules", LORA_DEFAULTS, layer)
    }


def _ia3(config: Mapping[str, Any], layer: int) -> dict[str, Bypass]:
    targets = _matching(config, "target_modules", IA3_DEFAULTS, layer)
    inputs = _matching(config, "feedforward_modules", IA3_INPUT_DEFAULTS, layer)
    return {target: Bypass(method="ia3_input" if target in inputs else "ia3_output", target=target) for target in targets}


def _bottleneck(config: Mapping[str, Any], layer: int) -> dict[str, Bypass]:
    """The configuration of LLM-Adapters: bottleneck_size, non_linearity, target_modules."""
    if config.get("use_parallel_adapter"):
        raise BypassError("use_parallel_adapter: is not supported")
    activation = config.get("non_linearity", "tanh")
    if activation not in ACTIVATIONS:
        raise BypassError(f"non_linearity: must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    rank = _rank(config, "bottleneck_size", 256)
    return {
        target: Bypass(method="bottleneck", target=target, rank=rank, activation=activation)
        for target in _matching(config, "target_modules", ("o_proj", "down_proj"), layer)
    }


REGISTRY: dict[str, Callable[[Mapping[str, Any], int], dict[str, Bypass]]] = {
    "LORA": _lora,
    "IA3": _ia3,
    "BOTTLENECK": _bottleneck,
}
"""By PEFT's `peft_type`: the bypasses of one layer."""


def _rank(config: Mapping[str, Any], field: str, default: int) -> int:
    value = config.get(field, default)
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise BypassError(f"{field}: must be a whole number from 1 to {MAX_RANK}, not {value!r}")
    return value


def _matching(config: Mapping[str, Any], field: str, default: tuple[str, ...], layer: int) -> list[str]:
    """Targets of a layer as PEFT finds them, without those that `exclude_modules` names."""
    wanted = list(default) if config.get(field) is None else config[field]
    excluded = _named(config, "exclude_modules", layer) if config.get("exclude_modules") else []
    if wanted == "all-linear":
        return [target for target in TARGETS if target not in excluded]
    return [target for target in _named({field: wanted}, field, layer) if target not in excluded]


def _named(config: Mapping[str, Any], field: str, layer: int) -> list[str]:
    """A string is a regular expression for whole paths, names are ends of paths."""
    wanted = config[field]
    paths = {target: f"model.layers.{layer}.{block}.{target}" for target, block in TARGETS.items()}
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise BypassError(f"{field}: {wanted!r} is no regular expression: {error}") from error
        return [target for target, path in paths.items() if pattern.fullmatch(path)]
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise BypassError(f"{field}: must be a list of names or a regular expression, not {wanted!r}")
    return [target for target, path in paths.items() if any(f".{path}".endswith(f".{name}") for name in wanted)]


def _layers(wanted: object, num_layers: int) -> frozenset[int]:
    if wanted is None:
        return frozenset(range(num_layers))
    chosen = [wanted] if type(wanted) is int else wanted
    if not isinstance(chosen, list) or not all(type(layer) is int and 0 <= layer < num_layers for layer in chosen):
        raise BypassError(f"layers_to_transform: must be layers from 0 to {num_layers - 1}, not {wanted!r}")
    return frozenset(chosen)
