"""Adapters (LoRA, (IA)3): weights, files in PEFT's layout, the update of a linear's output. Knows no job and no optimizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from common.activation_plan import ActivationPlan, plan_activations
from common.bypasses import Bypass
from common.messages import LoraSpec
from common.model_shape import ModelShape
from kernels import ops
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


_VERSIONS = itertools.count(1)


class InvalidAdapterError(ValueError):
    """The adapter does not fit its specification or the base model; the message names the field or tensor."""


class LoraLinear(NamedTuple):
    """One target's matrices and the columns of the fused linear's output that it updates."""

    columns: slice
    a_RI: Tensor
    b_OR: Tensor


class Scale(NamedTuple):
    """(IA)3's vector of one target, and the columns of the fused linear's output, or of its input, that it multiplies."""

    target: str
    columns: slice
    scale_C: Tensor
    is_input: bool


class LoraWeights:
    """The matrices, or vectors, of all targets as views of one flat tensor, so that an optimizer sees a single parameter."""

    def __init__(
        self,
        spec: LoraSpec,
        config: ModelConfig,
        *,
        layers: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        check_spec(spec)
        self.layers = tuple(range(config.num_layers)) if layers is None else tuple(sorted(layers))
        self.num_layers = config.num_layers
        """Of the model."""
        self.linears: dict[tuple[int, str], list[LoraLinear]] = {}
        self.scales: dict[tuple[int, str], list[Scale]] = {}
        self.tensors: dict[str, Tensor] = {}
        shapes = {target: shape for target, shape in _shapes(config).items() if target in spec.target_modules}
        per_layer = sum(_num_weights(spec, target, *shape) for target, shape in shapes.items())
        self.flat = ops.zero_weights(per_layer * len(self.layers), dtype, device)
        offset = 0
        for layer in self.layers:
            for module in MODULES:
                offset = self._add_module(layer, module, offset, spec, config)

    def _add_module(self, layer: int, module: str, offset: int, spec: LoraSpec, config: ModelConfig) -> int:
        block, targets = MODULES[module]
        linears, column = [], 0
        for target in targets:
            num_out, num_in = _shapes(config)[target]
            columns = slice(column, column + num_out)
            column += num_out
            if target not in spec.target_modules:
                continue
            key = f"base_model.model.model.layers.{layer}.{block}.{target}"
            if spec.method == "ia3":
                is_input = target in spec.feedforward_modules
                offset = self._add_scale(layer, module, key, offset, slice(0, num_in) if is_input else columns, is_input)
                continue
            middle, end = offset + spec.rank * num_in, offset + spec.rank * (num_in + num_out)
            linear = LoraLinear(
                columns, self.flat[offset:middle].view(spec.rank, num_in), self.flat[middle:end].view(num_out, spec.rank)
            )
            offset = end
            linears.append(linear)
            self.tensors[f"{key}.lora_A.weight"], self.tensors[f"{key}.lora_B.weight"] = linear.a_RI, linear.b_OR
        if linears:
            self.linears[layer, module] = linears
        return offset

    def _add_scale(self, layer: int, module: str, key: str, offset: int, columns: slice, is_input: bool) -> int:
        num_columns: int = columns.stop - columns.start
        scale_C = self.flat[offset : offset + num_columns]
        scale = Scale(key.rpartition(".")[2], columns, scale_C, is_input)
        self.scales.setdefault((layer, module), []).append(scale)
        self.tensors[f"{key}.ia3_l"] = scale_C[None] if is_input else scale_C[:, None]
        return offset + num_columns

    def fill(self, seed: int) -> None:
        """A uniform in +-1/sqrt(inputs), B zero, (IA)3's vectors one; the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        self.flat.fill_(1.0 if self.scales else 0.0)
        for linear in (linear for linears in self.linears.values() for linear in linears):
            a_RI = torch.empty(linear.a_RI.shape)
            torch.nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
            linear.a_RI.copy_(a_RI)

    def copy_from(self, source: dict[str, Tensor], what: str) -> None:
        """Take every matrix from `source`, in place. Raises InvalidAdapterError, and takes none, unless all fit."""
        missing, unknown = self.tensors.keys() - source.keys(), source.keys() - self.tensors.keys()
        for problem, names in (("lacks", missing), ("has unknown", unknown)):
            if names:
                raise InvalidAdapterError(f"{what} {problem} {min(names)} and {len(names) - 1} more; check targets and layers")
        for name, tensor in sorted(source.items()):
            if tensor.shape != (expected := self.tensors[name].shape):
                shapes = f"{tuple(tensor.shape)}, rank and base model ask for {tuple(expected)}"
                raise InvalidAdapterError(f"{what}: {name} has shape {shapes}; was it made for another model?")
            if not tensor.isfinite().all():
                raise InvalidAdapterError(f"{what}: {name} holds values that are not finite")
        for name, tensor in source.items():
            self.tensors[name].copy_(tensor)


class LoraAdapter:
    """One adapter on one base model, as PEFT computes it (LoraSpec), in its weights' type.

    With `is_training` the scale makes up for the inputs that dropout drops.
    """

    def __init__(self, name: str, spec: LoraSpec, weights: LoraWeights, *, is_training: bool = False) -> None:
        self.name = name
        self.spec = spec
        self.weights = weights
        self.scale = spec.scale / (1.0 - spec.dropout) if is_training else spec.scale
        self.version = next(_VERSIONS)
        """Another one for each adapter of this process, also for one that is loaded again under its name."""
        self._table: ops.AdapterTable | None = None
        self._matrices: ops.AdapterMatrices | None = None

    @classmethod
    def initialized(
        cls, name: str, spec: LoraSpec, config: ModelConfig, seed: int, device: torch.device | None = None
    ) -> LoraAdapter:
        """An adapter that changes nothing yet: A uniform as in PEFT (and nn.Linear), B zero."""
        weights = LoraWeights(spec, config, device=device)
        weights.fill(seed)
        return cls(name, spec, weights)

    @classmethod
    def from_safetensors(
        cls,
        name: str,
        spec: LoraSpec,
        data: bytes,
        config: ModelConfig,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> LoraAdapter:
        """The adapter in the bytes of an adapter_model.safetensors. Raises InvalidAdapterError if it does not fit."""
        check_spec(spec)
        tensors = read_tensors(data, f"adapter {name}")
        weights = LoraWeights(spec, config, device=device, dtype=dtype)
        weights.copy_from(tensors, f"adapter {name}")
        if not weights.flat.isfinite().all():
            raise InvalidAdapterError(f"adapter {name} holds values that are too large for {dtype}")
        return cls(name, spec, weights)

    def in_training(self) -> LoraAdapter:
        """The same weights under the scale of training rows."""
        return LoraAdapter(self.name, self.spec, self.weights, is_training=True)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that carry the adapter, ascending."""
        return self.weights.layers

    def activation_plan(self, shape: ModelShape, max_recompute_share: float = 0.0) -> ActivationPlan:
        """The activations that its training keeps, if this part of a forward pass may be run again."""
        targets = self.spec.target_modules
        bypasses = {name: _bypass(self.spec, name) for name in TARGETS if name in targets}
        layers = [bypasses if layer in self.layers else {} for layer in range(shape.num_layers)]
        return plan_activations(shape, layers, max_recompute_share)

    def has(self, layer: int, module: str) -> bool:
        """Whether any target inside this fused linear is adapted."""
        return (layer, module) in self.weights.linears or (layer, module) in self.weights.scales

    @property
    def is_native(self) -> bool:
        """Whether the compiled operations know its method and the type of its matrices."""
        return not self.weights.scales and self.weights.flat.dtype in (torch.bfloat16, torch.float32)

    def table(self, config: ModelConfig) -> ops.AdapterTable:
        """Its matrices in all layers; made once, they stay where they are."""
        if self._table is None:
            layers = [[self.segments(layer, module, 0, 1) for module in MODULES] for layer in range(config.num_layers)]
            self._table = ops.AdapterTable(layers, target_widths(config))
        return self._table

    def matrices(self) -> ops.AdapterMatrices:
        """Its matrices in all layers, where operations are Triton's; made once, they stay where they are."""
        if self._matrices is None:
            layers = [[self.segments(layer, module, 0, 1) for module in MODULES] for layer in range(self.weights.num_layers)]
            self._matrices = ops.AdapterMatrices(layers)
        return self._matrices

    def segments(self, layer: int, module: str, start: int, end: int) -> list[ops.LoraSegment]:
        """The updates of a fused linear's targets on rows [start, end) of a batch."""
        return [
            ops.LoraSegment(
                start=start, end=end, a_RI=linear.a_RI, b_OR=linear.b_OR, scale=self.scale, column=linear.columns.start
            )
            for linear in self.weights.linears.get((layer, module), ())
        ]

    def apply(self, layer: int, module: str, y_TO: Tensor, x_TI: Tensor) -> None:
        """Add the update of a linear with input `x_TI` to its output `y_TO`, in place."""
        ops.segmented_lora(y_TO, x_TI, self.segments(layer, module, 0, y_TO.shape[0]))

    def to_safetensors(self) -> bytes:
        """The bytes of PEFT's adapter_model.safetensors."""
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in self.weights.tensors.items()})


def read_tensors(data: bytes, what: str) -> dict[str, Tensor]:
    """The tensors of safetensors bytes. Raises InvalidAdapterError for anything else."""
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise InvalidAdapterError(f"{what} is not in safetensors format: {error}") from error


def check_rank(spec: LoraSpec, max_rank: int, where: str) -> None:
    """Raises InvalidAdapterError, beginning with `where`, for a higher rank; one of another method than LoRA has none."""
    if spec.method == "lora" and spec.rank > max_rank:
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


def _check_feedforward(spec: LoraSpec) -> None:
    scaled = set(spec.feedforward_modules)
    if scaled and spec.method != "ia3":
        raise InvalidAdapterError("feedforward_modules belong to the method ia3")
    if other := sorted(scaled - set(spec.target_modules)):
        raise InvalidAdapterError(f"feedforward_modules must be among target_modules; {', '.join(other)} is not")
    if other := sorted(scaled - set(INPUT_SCALED)):
        raise InvalidAdapterError(f"feedforward_modules may be {', '.join(INPUT_SCALED)}, not {', '.join(other)}")


def _bypass(spec: LoraSpec, target: str) -> Bypass:
    if spec.method == "lora":
        return Bypass(method="lora", target=target, rank=spec.rank)
    return Bypass(method="ia3_input" if target in spec.feedforward_modules else "ia3_output", target=target)


def _num_weights(spec: LoraSpec, target: str, num_out: int, num_in: int) -> int:
    if spec.method == "lora":
        return spec.rank * (num_in + num_out)
    return num_in if target in spec.feedforward_modules else num_out


def target_widths(config: ModelConfig) -> list[list[int]]:
    """Output features of the targets that lie side by side in each of MODULES."""
    return [[_shapes(config)[target][0] for target in targets] for _, targets in MODULES.values()]


def _shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
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
