"""LoRA adapters: weights, files in PEFT's layout, the update of a linear's output. Knows no job and no optimizer."""

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


_VERSIONS = itertools.count(1)


class InvalidAdapterError(ValueError):
    """The adapter does not fit its specification or the base model; the message names the field or tensor."""


class LoraLinear(NamedTuple):
    """One target's matrices and the columns of the fused linear's output that it updates."""

    columns: slice
    a_RI: Tensor
    b_OR: Tensor


class LoraWeights:
    """The matrices of all targets as views of one flat tensor, so that an optimizer sees a single parameter."""

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
        self.linears: dict[tuple[int, str], list[LoraLinear]] = {}
        self.tensors: dict[str, Tensor] = {}
        per_layer = sum(spec.rank * (i + o) for target, (o, i) in _shapes(config).items() if target in spec.target_modules)
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
            middle, end = offset + spec.rank * num_in, offset + spec.rank * (num_in + num_out)
            linear = LoraLinear(
                columns, self.flat[offset:middle].view(spec.rank, num_in), self.flat[middle:end].view(num_out, spec.rank)
            )
            offset = end
            linears.append(linear)
            key = f"base_model.model.model.layers.{layer}.{block}.{target}"
            self.tensors[f"{key}.lora_A.weight"], self.tensors[f"{key}.lora_B.weight"] = linear.a_RI, linear.b_OR
        if linears:
            self.linears[layer, module] = linears
        return offset

    def fill(self, seed: int) -> None:
        """A uniform in +-1/sqrt(inputs), B zero; the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        self.flat.zero_()
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
    """One adapter on one base model, as PEFT computes it: y += scale * x A^T B^T on each target, in fp32.

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
        bypasses = {name: Bypass(method="lora", target=name, rank=self.spec.rank) for name in TARGETS if name in targets}
        layers = [bypasses if layer in self.layers else {} for layer in range(shape.num_layers)]
        return plan_activations(shape, layers, max_recompute_share)

    def has(self, layer: int, module: str) -> bool:
        """Whether any target inside this fused linear is adapted."""
        return (layer, module) in self.weights.linears

    @property
    def is_native(self) -> bool:
        """Whether the compiled operations know the type of its matrices."""
        return self.weights.flat.dtype in (torch.bfloat16, torch.float32)

    def table(self, config: ModelConfig) -> ops.AdapterTable:
        """Its matrices in all layers; made once, they stay where they are."""
        if self._table is None:
            layers = [[self.segments(layer, module, 0, 1) for module in MODULES] for layer in range(config.num_layers)]
            self._table = ops.AdapterTable(layers, target_widths(config))
        return self._table

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
