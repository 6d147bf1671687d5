"""`operations`, Triton's, imported when one is first used: a machine without Triton never needs it. Knows no operation."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.triton_ops import operations as operations
else:

    def __getattr__(name: str) -> ModuleType:
        """Asked for once: then the name is here."""
        if name != "operations":
            raise AttributeError(name)
        globals()[name] = importlib.import_module("kernels.triton_ops.operations")
        return globals()[name]
