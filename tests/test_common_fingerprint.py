"""A model is told from others by its norms and vocabulary, whatever precision its file has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.fingerprint import fingerprint
from common.model_folder import ModelFolderError


def folder(path: Path, dtype: torch.dtype = torch.bfloat16, vocab_size: int = 9, seed: int = 0) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    norm_H = torch.rand(64, generator=torch.Generator().manual_seed(seed))
    save_file({"model.norm.weight": norm_H.to(dtype), "lm_head.weight": torch.rand(2, 3)}, path / "model.safetensors")
    return path


def test_precision_and_other_weights_do_not_matter(tmp_path: Path) -> None:
    assert fingerprint(folder(tmp_path / "half")) == fingerprint(folder(tmp_path / "full", torch.float32))
    assert len(fingerprint(tmp_path / "half")) == 16


def test_norms_and_vocabulary_matter(tmp_path: Path) -> None:
    plain, other, wide = folder(tmp_path / "a"), folder(tmp_path / "b", seed=1), folder(tmp_path / "c", vocab_size=10)
    assert len({fingerprint(each) for each in (plain, other, wide)}) == 3


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{}", b'\x0c\0\0\0\0\0\0\0{"norm": "x"}'])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFolderError, match=str(tmp_path)):
        fingerprint(tmp_path)
