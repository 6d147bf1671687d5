"""A pass through the Triton path: launches, and waits for the device, do not depend on how much it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch.overrides import TorchFunctionMode

import tests.triton_stage as stage
from kernels import ops
from services.executor.engine import Engine
from tests import tiny
from tests.helpers import OperatorCount
from tests.test_executor_launches import adapters, contexts, jobs, requests, sampled, short_chunks, trees

pytestmark = pytest.mark.skipif(stage.HAS_GPU, reason="counts operators of a CPU")
FEW, MANY = 2, 5


class HostReads(TorchFunctionMode):
    """Counts the calls inside the `with` block that would make the host wait for a GPU: values of tensors on the host."""

    NAMES = ("tolist", "item", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in self.NAMES:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [requests, adapters, trees, short_chunks, contexts, jobs, sampled])
def test_launches_and_waits_do_not_grow(kind: Callable[[int], Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "interprets_triton", True)
    tiny.tiny_pair.cache_clear()
    launches, reads = [], []
    for n in (FEW, MANY):
        engine = kind(n)
        with OperatorCount() as operators, HostReads() as host:
            engine.forward_pass()
        assert operators.by_name["ragged_attention"] == engine.decoder.config.num_layers
        launches.append(operators.by_name)
        reads.append(host.by_name)
    tiny.tiny_pair.cache_clear()
    assert launches[1] - launches[0] == Counter()
    assert reads[1] == reads[0]
    assert reads[0]["tolist"] == 1
