"""Adapters (LoRA, (IA)3, bottlenecks): weights, files in PEFT's layout, a linear's update. Knows no job and no optimizer."""

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
from common.messages import LoraSpec
from common.model_shape import ModelShape
from kernels import ops
from services.executor.adapter_spec import (
    MODULES,
    TARGETS,
    InvalidAdapterError,
    bypass_of,
    check_spec,
    num_weights,
    target_shapes,
    target_widths,
)
from services.executor.model_config import ModelConfig

_VERSIONS = itertools.count(1)


class LoraLinear(NamedTuple):
    """One target's matrices and the columns of the fused linear's output that it updates."""

    columns: slice
    a_RI: Tensor
    b_OR: Tensor


class Bottleneck(NamedTuple):
    """The matrices behind one linear: y += up(activation(down y)) on its output of H features."""

    down_RH: Tensor
    up_HR: Tensor


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
        self.bottlenecks: dict[tuple[int, str], Bottleneck] = {}
        self.tensors: dict[str, Tensor] = {}
        shapes = {target: shape for target, shape in target_shapes(config).items() if target in spec.target_modules}
        per_layer = sum(num_weights(spec, target, *shape) for target, shape in shapes.items())
        self.flat = ops.zero_weights(per_layer * len(self.layers), dtype, device)
        offset = 0
        for layer in self.layers:
            for module in MODULES:
                offset = self._add_module(layer, module, offset, spec, config)

    def _add_module(self, layer: int, module: str, offset: int, spec: LoraSpec, config: ModelConfig) -> int:
        block, targets = MODULES[module]
        linears, column = [], 0
        for target in targets:
            num_out, num_in = target_shapes(config)[target]
            columns = slice(column, column + num_out)
            column += num_out
            if target not in spec.target_modules:
                continue
            key = f"base_model.model.model.layers.{layer}.{block}.{target}"
            if spec.method == "ia3":
                is_input = target in spec.feedforward_modules
                offset = self._add_scale(layer, module, key, offset, slice(0, num_in) if is_input else columns, is_input)
                continue
            if spec.method == "bottleneck":
                offset = self._add_bottleneck(layer, module, key, offset, spec.rank, num_out)
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

    def _add_bottleneck(self, layer: int, module: str, key: str, offset: int, rank: int, num_out: int) -> int:
        down, up = torch.split(self.flat[offset : offset + 2 * rank * num_out], rank * num_out)
        bottleneck = Bottleneck(down.view(rank, num_out), up.view(num_out, rank))
        self.bottlenecks[layer, module] = bottleneck
        self.tensors |= {f"{key}.adapter_down.weight": bottleneck.down_RH, f"{key}.adapter_up.weight": bottleneck.up_HR}
        return offset + 2 * rank * num_out

    def _add_scale(self, layer: int, module: str, key: str, offset: int, columns: slice, is_input: bool) -> int:
        num_columns: int = columns.stop - columns.start
        scale_C = self.flat[offset : offset + num_columns]
        scale = Scale(key.rpartition(".")[2], columns, scale_C, is_input)
        self.scales.setdefault((layer, module), []).append(scale)
        self.tensors[f"{key}.ia3_l"] = scale_C[None] if is_input else scale_C[:, None]
        return offset + num_columns

    def fill(self, seed: int) -> None:
        """A and down uniform in +-1/sqrt(inputs), B and up zero, (IA)3's vectors one; the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        self.flat.fill_(1.0 if self.scales else 0.0)
        matrices = [linear.a_RI for linears in self.linears.values() for linear in linears]
        for matrix in matrices + [bottleneck.down_RH for bottleneck in self.bottlenecks.values()]:
            values = torch.empty(matrix.shape)
            torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            matrix.copy_(values)

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
        """An adapter that changes nothing yet: A (or down) uniform as in PEFT (and nn.Linear), B (or up) zero."""
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
        bypasses = {name: bypass_of(self.spec, name) for name in TARGETS if name in targets}
        layers = [bypasses if layer in self.layers else {} for layer in range(shape.num_layers)]
        return plan_activations(shape, layers, max_recompute_share)

    def has(self, layer: int, module: str) -> bool:
        """Whether any target inside this fused linear is adapted."""
        weights = self.weights
        return any((layer, module) in found for found in (weights.linears, weights.scales, weights.bottlenecks))

    @property
    def is_native(self) -> bool:
        """Whether the compiled operations know its method and the type of its matrices."""
        is_lora = not self.weights.scales and not self.weights.bottlenecks
        return is_lora and self.weights.flat.dtype in (torch.bfloat16, torch.float32)

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
