"""A bottleneck adapter as plain modules inside a transformers model: the oracle of what serves and trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.messages import LoraSpec, TrainingSlice
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder
from tests.helpers import randn

Drop = Callable[[Tensor], Tensor]


class BottleneckAdapter(nn.Module):
    """Houlsby et al. 2019, figure 2, behind a linear: y + up(activation(down(y))), without biases."""

    def __init__(self, linear: nn.Module, down: Tensor, up: Tensor, non_linearity: str) -> None:
        super().__init__()
        self.linear, self.activation = linear, getattr(F, non_linearity)
        self.adapter_down = nn.Linear(down.shape[1], down.shape[0], bias=False)
        self.adapter_up = nn.Linear(up.shape[1], up.shape[0], bias=False)
        self.adapter_down.weight, self.adapter_up.weight = (nn.Parameter(matrix.clone()) for matrix in (down, up))
        self.drop: Drop = lambda y: y

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        update: Tensor = self.adapter_up(self.activation(self.adapter_down(self.drop(y).to(self.adapter_down.weight.dtype))))
        return y + update.to(y.dtype)  # type: ignore[no-any-return]


def inserted(model: Any, tensors: dict[str, Tensor], spec: LoraSpec) -> dict[str, BottleneckAdapter]:
    """Put the adapter whose file has these tensors into the model; its modules by the name of the linear they replaced."""
    model.requires_grad_(False)
    found = {}
    for key in [name.removesuffix(".adapter_down.weight") for name in tensors if name.endswith(".adapter_down.weight")]:
        path = key.removeprefix("base_model.model.")
        parent, _, name = path.rpartition(".")
        down, up = (tensors[f"{key}.{part}.weight"] for part in ("adapter_down", "adapter_up"))
        module = found[path] = BottleneckAdapter(model.get_submodule(path), down, up, spec.non_linearity)
        setattr(model.get_submodule(parent), name, module)
    assert 2 * len(found) == len(tensors) > 0
    return found


def oracle_gradients(
    model: Any, adapter: LoraAdapter, items: Sequence[TrainingSlice], drops: dict[str, Drop] | None = None
) -> dict[str, Tensor]:
    """Whole-sequence autograd, by the names of the adapter's file; `drops` are by linear, for a single sequence."""
    modules = inserted(model, adapter.weights.tensors, adapter.spec)
    for name, drop in (drops or {}).items():
        modules[name].drop = drop
    for item in items:
        logits = model(input_ids=torch.tensor([item.tokens])).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.tensor(item.tokens[1:]), reduction="none")
        torch.autograd.backward((losses * torch.tensor(item.weights[1:], dtype=losses.dtype)).sum())
    return {
        f"base_model.model.{path}.{name}": parameter.grad
        for path, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def random_bottleneck(
    decoder: Decoder, spec: LoraSpec, *, layers: tuple[int, ...] | None = None, seed: int = 0, dtype: torch.dtype | None = None
) -> LoraAdapter:
    """Both matrices away from zero, in the decoder's type, at least fp32, or in this one."""
    dtype = torch.promote_types(decoder.dtype, torch.float32) if dtype is None else dtype
    weights = LoraWeights(spec, decoder.config, layers=layers, dtype=dtype)
    weights.flat.copy_(0.3 * randn(*weights.flat.shape, seed=seed))
    return LoraAdapter("adapter", spec, weights)
