"""Hidden states of texts in a file without a name: bounded by the disk, not by memory. Knows no model."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from services.cli.distill_data import DistillError


class HiddenStates:
    """Room for [num_rows, num_features] in bfloat16; what was read lately is in memory, as much as fits."""

    def __init__(self, folder: Path, num_rows: int, num_features: int) -> None:
        """The file lies in `folder` and is gone when the last tensor in it is. Raises DistillError where the disk is full."""
        size = num_rows * num_features
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, size * torch.bfloat16.itemsize))
            except OSError as error:
                raise DistillError(f"{size * torch.bfloat16.itemsize:,} bytes of hidden states: {error.strerror}") from error
            rows = torch.from_file(file.name, shared=True, size=size, dtype=torch.bfloat16)
        self._rows_NF = rows.view(num_rows, num_features)
        self._num_kept = 0

    def keep(self, features_TF: Tensor) -> Tensor:
        """The same rows, in the file."""
        end = self._num_kept + len(features_TF)
        kept_TF = self._rows_NF[self._num_kept : end]
        kept_TF.copy_(features_TF)
        self._num_kept = end
        return kept_TF
