"""What one case of the kernel benchmark is: a call, its oracle, its peers, its traffic and work, its goal. Knows no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

REL_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""dtype -> the norm of the error over the norm of the oracle, which may round as often as the kernel does."""


class Randn(Protocol):
    """Makes normal numbers of a shape, in the case's type and on its device."""

    def __call__(self, *shape: int) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Llama-3.1-8B's, unless said otherwise."""

    rows: tuple[int, ...] = (64, 4096)
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256
    context: int = 8192
    decodes: tuple[int, ...] = (1, 16, 64)
    tree_nodes: int = 16
    prefill: int = 4096
    mixed_decodes: int = 16
    loss_rows: int = 256
    adapters: tuple[int, ...] = (1, 32)
    lora_rows: tuple[int, ...] = (64, 1024)
    rank: int = 16
    layers: int = 32
    moved: int = 256


class Goal(NamedTuple):
    """`of_copy` and `of_matmul`: at least that share of the device's ceiling. `over_peer`: at most that much more time."""

    measure: str
    share: float

    def is_met(self, value: float) -> bool:
        """By a kernel's value of this measure."""
        return value <= self.share if self.measure == "over_peer" else value >= self.share

    def __str__(self) -> str:
        return f"{self.measure} {'<=' if self.measure == 'over_peer' else '>='} {self.share:.0%}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """`run` and `oracle` return the same tensors; `peers` return the first of them, if `are_peers_checked`.

    `timed` is the call without what only the check needs. Without peers the oracle is what the kernel is compared with.
    """

    kernel: str
    shape: str
    run: Callable[[], tuple[Tensor, ...]]
    oracle: Callable[[], tuple[Tensor, ...]]
    timed: Callable[[], object] | None = None
    peers: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    are_peers_checked: bool = True
    goal: Goal | None = None
    num_bytes: int = 0
    num_flops: int = 0

    def check(self) -> None:
        """Raises ValueError unless the kernel, and each peer, does what the reference does."""
        expected = self.oracle()
        for actual, wanted in zip(self.run(), expected, strict=True):
            self._check_one("", actual, wanted)
        if self.are_peers_checked:
            for name, peer in self.peers.items():
                self._check_one(f"{name}, ", peer(), expected[0])

    def _check_one(self, whose: str, actual: Tensor, expected: Tensor) -> None:
        if not actual.is_floating_point():
            if not torch.equal(actual, expected):
                raise ValueError(f"{whose}{self.kernel} {self.shape}: other whole numbers")
            return
        error = float((actual.double() - expected.double()).norm() / expected.double().norm())
        if not error <= REL_ERROR[actual.dtype]:
            raise ValueError(f"{whose}{self.kernel} {self.shape}: relative error {error:.2e}")
