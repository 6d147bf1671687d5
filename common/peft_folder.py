"""Folders of one adapter in Hugging Face PEFT's layout, read strictly. Knows names, shapes, settings; no torch, no model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from common.messages import LoraSpec

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_WEIGHTS_BYTES = 4 << 30
TARGETS = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip
"""The linears that an adapter may update, and the block of a layer that each is part of."""
BOTTLENECK_TARGETS = ("o_proj", "down_proj")
"""Those that end a sublayer: bottlenecks follow attention and MLP (Houlsby et al. 2019) or the MLP (Pfeiffer et al. 2020)."""
NON_LINEARITIES = ("relu", "gelu")
REFUSED = (
    "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layers_to_transform", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "megatron_config", "use_bdlora",
)  # fmt: skip
"""Settings that change what the adapter computes, in ways that are not served."""
DTYPES = ("F32", "F16", "BF16")
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
_BOTTLENECK_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.adapter_(down|up)\.weight")
_IA3_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.ia3_l")


class PeftFolderError(ValueError):
    """The folder is no adapter that can be served; the message names the file and the field or tensor."""


class PeftFolder(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter as it was read. `base_model` is what its maker called the base model, perhaps a path; `weights` the file."""

    base_model: str
    lora: LoraSpec
    weights: bytes


def read_peft_folder(folder: Path, max_bytes: int = MAX_WEIGHTS_BYTES) -> PeftFolder:
    """Raises PeftFolderError for what is missing, damaged or not supported; FileNotFoundError when there is no such folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    config = _read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise PeftFolderError(f"{folder} has no {WEIGHTS}")
    if (num_bytes := (folder / WEIGHTS).stat().st_size) > max_bytes:
        raise PeftFolderError(f"{WEIGHTS} has {num_bytes} bytes, the limit is {max_bytes}")
    weights = (folder / WEIGHTS).read_bytes()
    lora = KINDS[config["peft_type"]](config, _header(weights))
    _check_targets(config.get("target_modules"), lora.target_modules)
    return PeftFolder(base_model=str(config.get("base_model_name_or_path") or ""), lora=lora, weights=weights)


def _lora(config: Mapping[str, Any], header: Mapping[str, Any]) -> LoraSpec:
    rank = int(_number(config, "r", 1))
    targets = _targets(header, _KEY, ("A", "B"), "r", rank)
    return LoraSpec(rank=rank, alpha=_alpha(config), target_modules=targets, use_rslora=bool(config.get("use_rslora")))


def _bottleneck(config: Mapping[str, Any], header: Mapping[str, Any]) -> LoraSpec:
    """The words of LLM-Adapters (Hu et al. 2023), which call a serial adapter behind a linear so; PEFT has none."""
    rank = int(_number(config, "bottleneck_size", 1))
    if (activation := config.get("non_linearity")) not in NON_LINEARITIES:
        raise PeftFolderError(f"{CONFIG}: non_linearity must be {' or '.join(NON_LINEARITIES)}, not {activation!r}")
    if config.get("scaling") not in (None, 1.0):
        raise PeftFolderError(f"{CONFIG}: scaling must be 1, not {config['scaling']!r}")
    if config.get("use_parallel_adapter"):
        raise PeftFolderError(f"{CONFIG}: use_parallel_adapter is not supported")
    targets = _targets(header, _BOTTLENECK_KEY, ("down", "up"), "bottleneck_size", rank)
    if other := [name for name in targets if name not in BOTTLENECK_TARGETS]:
        raise PeftFolderError(
            f"{WEIGHTS}: a bottleneck behind {other[0]} is not supported, only {', '.join(BOTTLENECK_TARGETS)}"
        )
    return LoraSpec(method="bottleneck", rank=rank, non_linearity=activation, target_modules=targets)


def _ia3(_: Mapping[str, Any], header: Mapping[str, Any]) -> LoraSpec:
    """What each vector multiplies shows in its shape: [1, n] for inputs, [n, 1] for outputs."""
    found: dict[tuple[int, str], bool] = {}
    for name, entry in header.items():
        match = _IA3_KEY.fullmatch(name)
        if match is None or TARGETS.get(match[3]) != match[2]:
            raise PeftFolderError(f"{WEIGHTS}: tensor {name} is not supported; targets may be {', '.join(TARGETS)}")
        shape = _shape(name, entry)
        if 1 not in shape:
            raise PeftFolderError(f"{WEIGHTS}: tensor {name} has shape {tuple(shape)}, which is no vector")
        found[int(match[1]), match[3]] = shape[0] == 1
    targets = tuple(target for target in TARGETS if any(name == target for _, name in found))
    if not targets:
        raise PeftFolderError(f"{WEIGHTS} holds no tensor")
    for layer in range(max(layer for layer, _ in found) + 1):
        for target in targets:
            if found.get((layer, target)) is not found.get((0, target)) or (0, target) not in found:
                raise PeftFolderError(f"{WEIGHTS}: {target} in layer {layer}: all layers must be adapted alike")
    inputs = tuple(target for target in targets if found[0, target])
    return LoraSpec(method="ia3", target_modules=targets, feedforward_modules=inputs)


def _shape(name: str, entry: object) -> list[int]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(shape, list) or len(shape) != 2 or entry.get("dtype") not in DTYPES:
        raise PeftFolderError(f"{WEIGHTS}: tensor {name} must be a matrix of {', '.join(DTYPES)}")
    return shape


def is_same_model(made_for: str, *names: str) -> bool:
    """Whether an adapter's base model, a name or path, can be meant by one of these names: their last parts are equal."""
    last = made_for.rstrip("/").rpartition("/")[2].casefold()
    return any(last == name.rstrip("/").rpartition("/")[2].casefold() for name in names)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PeftFolderError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise PeftFolderError(f"{path} is not a JSON object")
    if config.get("peft_type") not in tuple(KINDS):
        raise PeftFolderError(f"{CONFIG}: peft_type must be one of {', '.join(KINDS)}, not {config.get('peft_type')!r}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise PeftFolderError(f"{CONFIG}: task_type must be CAUSAL_LM, not {config['task_type']!r}")
    if config.get("bias") not in (None, "none"):
        raise PeftFolderError(f"{CONFIG}: bias must be none, not {config['bias']!r}")
    for field in REFUSED:
        if config.get(field):
            raise PeftFolderError(f"{CONFIG}: {field} is not supported")
    for field, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict) or any(value != config.get(usual) for value in pattern.values()):
            raise PeftFolderError(f"{CONFIG}: {field} is not supported: all modules must have the same {usual}")
    return config


def _number(config: Mapping[str, Any], field: str, lowest: float) -> float:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < lowest:
        raise PeftFolderError(f"{CONFIG}: {field} must be a number of at least {lowest:g}, not {value!r}")
    if field != "lora_alpha" and value != int(value):
        raise PeftFolderError(f"{CONFIG}: {field} must be a whole number, not {value!r}")
    return value


def _alpha(config: Mapping[str, Any]) -> float:
    alpha = float(_number(config, "lora_alpha", 0))
    if alpha == 0:
        raise PeftFolderError(f"{CONFIG}: lora_alpha is 0: the adapter does nothing")
    return alpha


def _header(weights: bytes) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes of length, then JSON."""
    length = int.from_bytes(weights[:8], "little")
    if not 2 <= length <= len(weights) - 8:
        raise PeftFolderError(f"{WEIGHTS} is not in safetensors format, or cut off")
    try:
        header = msgspec.json.decode(weights[8 : 8 + length], type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PeftFolderError(f"{WEIGHTS} is not in safetensors format: {error}") from error
    header.pop("__metadata__", None)
    return header


def _targets(
    header: Mapping[str, Any], key: re.Pattern[str], parts: tuple[str, str], rank_field: str, rank: int
) -> tuple[str, ...]:
    """The targets of which there is a pair of matrices, `parts`, in every layer that has any. All else is an error."""
    found: dict[tuple[int, str], set[str]] = {}
    for name, entry in header.items():
        match = key.fullmatch(name)
        if match is None or TARGETS.get(match[3]) != match[2]:
            raise PeftFolderError(f"{WEIGHTS}: tensor {name} is not supported; targets may be {', '.join(TARGETS)}")
        shape = _shape(name, entry)
        if shape[parts.index(match[4])] != rank:
            raise PeftFolderError(f"{WEIGHTS}: tensor {name} has shape {tuple(shape)}, but {rank_field} is {rank}")
        found.setdefault((int(match[1]), match[3]), set()).add(match[4])
    targets = tuple(target for target in TARGETS if any(name == target for _, name in found))
    if not targets:
        raise PeftFolderError(f"{WEIGHTS} holds no tensor")
    for layer in range(max(layer for layer, _ in found) + 1):
        for target in targets:
            if found.get((layer, target)) != set(parts):
                raise PeftFolderError(
                    f"{WEIGHTS} lacks a matrix of {target} in layer {layer}: all layers must be adapted alike"
                )
    return targets


def _check_targets(named: object, targets: tuple[str, ...]) -> None:
    """Targets that the configuration names are in the file; patterns, and names of single modules, are not checked."""
    if isinstance(named, list) and (missing := [name for name in named if name in TARGETS and name not in targets]):
        raise PeftFolderError(f"{CONFIG}: target_modules names {missing[0]}, of which {WEIGHTS} has no tensor")


KINDS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], LoraSpec]] = {
    "LORA": _lora,
    "IA3": _ia3,
    "BOTTLENECK": _bottleneck,
}
"""By `peft_type`: the adapter's shape, from configuration and header."""
