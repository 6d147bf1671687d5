"""`heddle adapters`, on a real NATS server and with the real PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save

from common import subjects
from common.bus import Bus
from common.codec import encode
from common.messages import AdapterRecord, LoraSpec
from services.cli.adapters import AdapterError, delete, export, list_adapters, write_folder
from tests.helpers import randn, tiny_model

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
RANK = 4


def record(name: str = "weaver", **changes: Any) -> AdapterRecord:
    lora = LoraSpec(rank=RANK, alpha=8.0, target_modules=("q_proj", "down_proj"))
    fields: dict[str, Any] = {"base_model": "tiny", "artifact": name, "lora": lora, "created_at": 1.0} | changes
    return AdapterRecord(name=name, **fields)


def lora_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Adapter weights under PEFT's names, for the first layer."""
    tensors = {}
    for seed, module in enumerate(MODULES):
        num_out, num_in = model.get_submodule(module).weight.shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = randn(RANK, num_in, seed=seed).float()
        tensors[f"base_model.model.{module}.lora_B.weight"] = randn(num_out, RANK, seed=seed + 10).float()
    return tensors


async def publish(bus: Bus, adapter: AdapterRecord, weights: bytes | None) -> None:
    await (await bus.key_value(subjects.ADAPTERS_BUCKET)).put(adapter.name, encode(adapter))
    if weights is not None:
        await (await bus.object_store(subjects.ARTIFACTS_STORE)).put(adapter.artifact, weights)


async def test_an_exported_adapter_loads_with_peft_and_computes_what_was_trained(bus: Bus, tmp_path: Path) -> None:
    plain, merged = tiny_model(num_hidden_layers=1), tiny_model(num_hidden_layers=1)
    tensors = lora_tensors(plain)
    await publish(bus, record(), save(tensors))
    await export(bus, "weaver", tmp_path / "out")
    for module in MODULES:
        down, up = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        merged.get_submodule(module).weight.data += up @ down * (8.0 / RANK)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = plain(tokens).logits
        after = peft.PeftModel.from_pretrained(plain, str(tmp_path / "out"))(tokens).logits
        torch.testing.assert_close(after, merged(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, atol=1e-2)


async def test_an_export_says_what_it_is(bus: Bus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    await publish(bus, record(job_id="ftjob-1"), b"weights")
    await export(bus, "weaver", out)
    card = (out / "README.md").read_text()
    assert "base_model: tiny" in card
    assert "ftjob-1" in card
    assert (out / "adapter_model.safetensors").read_bytes() == b"weights"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (RANK, 8.0, ["q_proj", "down_proj"])


async def test_adapters_are_listed_oldest_first(bus: Bus) -> None:
    assert await list_adapters(bus) == []
    for name, created_at in (("b", 3.0), ("c", 1.0), ("a", 2.0)):
        await publish(bus, record(name, created_at=created_at), None)
    assert [adapter.name for adapter in await list_adapters(bus)] == ["c", "a", "b"]


async def test_what_cannot_be_exported_is_a_clear_error(bus: Bus, tmp_path: Path) -> None:
    await publish(bus, record("hollow"), None)
    with pytest.raises(AdapterError, match="no adapter ghost; there are: hollow"):
        await export(bus, "ghost", tmp_path)
    with pytest.raises(AdapterError, match="not in the object store"):
        await export(bus, "hollow", tmp_path)
    await (await bus.key_value(subjects.ADAPTERS_BUCKET)).put("broken", b"garbage")
    with pytest.raises(AdapterError, match="the record of adapter broken is damaged"):
        await list_adapters(bus)


async def test_of_many_adapters_an_error_names_the_closest_or_a_few(bus: Bus, tmp_path: Path) -> None:
    for number in range(13):
        await publish(bus, record(f"weaver-{number:02}", created_at=float(number)), None)
    for call in (export(bus, "weaver-1", tmp_path), delete(bus, "weaver-1")):
        with pytest.raises(AdapterError, match=r"^no adapter weaver-1; did you mean (weaver-\d\d or ){2}weaver-\d\d\?$"):
            await call
    for call in (export(bus, "ghost", tmp_path), delete(bus, "ghost")):
        with pytest.raises(AdapterError, match=r"^no adapter ghost; there are: (weaver-\d\d, ){9}weaver-09 and 3 more$"):
            await call


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="is not empty"):
        write_folder(tmp_path, record(), b"")
    with pytest.raises(AdapterError, match="cannot write"):
        write_folder(tmp_path / "notes.txt", record(), b"")
