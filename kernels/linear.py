"""A frozen linear whose weight is laid out once for the units that multiply it. Knows no model.

In bf16 the compiled library multiplies on AMX tiles and with AVX2; where a processor has bf16 instructions but no tiles, oneDNN
does. Measured there, 30 layers of SmolLM2-135M and its head, 2 cores with AVX512-BF16, oneDNN's layout instead of the plain
weight: 12.1 -> 8.1 ms at 1 row, 16.5 -> 11.5 at 16, 45 -> 29 at 64, 92 -> 87 at 256.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.native import operations as native
from kernels.native.build import level

TYPICAL_ROWS = 16
"""oneDNN chooses the layout for about so many rows; it is right for any number."""
WIDENED_OUTPUTS = 4096
"""Outputs of a weight that are widened at a time."""
Product = Callable[[Tensor], Tensor]


class Linear:
    """Semantics: y_TO = x_TI @ weight_OI^T + bias_O; `backward` gives the input's gradient.

    Where the compiled library multiplies, its layout is all that is kept: it goes both ways. Elsewhere the plain weight stays.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self.dtype = weight_OI.dtype
        self.packed = _compiled(weight_OI, bias_O)
        """What multiplies, if that is the compiled library."""
        onednn = _onednn(weight_OI, bias_O) if self.packed is None else None
        self._weight_OI = weight_OI if self.packed is None else None
        self._bias_O = bias_O
        self._forward: Product = self.packed or onednn or self._plain
        self._is_widened = weight_OI.device.type == "cpu" and weight_OI.dtype.itemsize == 2 and not _has_fast_half(weight_OI)

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self._forward(x_TI)

    def backward(self, dy_TO: Tensor) -> Tensor:
        """dx_TI = dy_TO @ weight_OI.

        Compiled where the forward is: torch's rows differ in their last bits with the number of rows that share a product.
        """
        if self.packed is not None:
            return self.packed.backward(dy_TO)
        weight_OI = self.weight()
        return _widened_product(dy_TO, weight_OI) if self._is_widened else dy_TO @ weight_OI

    def weight(self) -> Tensor:
        """The plain weight [O, I], made again where only another layout is kept."""
        if self._weight_OI is not None:
            return self._weight_OI
        assert self.packed is not None
        return self.packed.weight()

    def _plain(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight(), self._bias_O)


def _widened_product(dy_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """In float32, a part of the weight at a time: torch multiplies half precision far slower without the processor's help."""
    dx_TI = torch.zeros(len(dy_TO), weight_OI.shape[1], dtype=torch.float32)
    for dy, weight in zip(torch.split(dy_TO, WIDENED_OUTPUTS, dim=1), torch.split(weight_OI, WIDENED_OUTPUTS), strict=True):
        dx_TI.addmm_(dy.float(), weight.float())
    return dx_TI.to(dy_TO.dtype)


def _has_fast_half(weight: Tensor) -> bool:
    """Whether torch itself multiplies this weight's half precision with the processor's own instructions."""
    return weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _onednn(weight_OI: Tensor, bias_O: Tensor | None) -> Product | None:
    if weight_OI.device.type != "cpu" or not _has_fast_half(weight_OI):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, TYPICAL_ROWS)
    return lambda x_TI: torch.ops.mkldnn._linear_pointwise(x_TI, packed, bias_O, "none", [], "")


def _compiled(weight: Tensor, bias_O: Tensor | None) -> native.PackedLinear | None:
    if not native.takes(weight) or (_has_fast_half(weight) and level() != "amx"):
        return None  # or slower than what torch has
    return native.PackedLinear(weight, bias_O)
