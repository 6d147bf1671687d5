"""`heddle adapters import` and `delete`: folders that PEFT wrote, served by a real executor; what is refused, and why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import safetensors.torch
import torch

from common import subjects
from common.bus import Bus
from common.messages import AdapterRecord, Admitted, LoraSpec
from common.nats_server import NatsServer
from common.peft_folder import PeftFolderError, is_same_model, read_peft_folder
from services.cli.__main__ import main
from services.cli.adapters import AdapterError, delete, export, import_folder, list_adapters, write_folder
from tests.bottleneck_oracle import inserted, random_bottleneck
from tests.executor_stage import MODEL, Connect, Stage, known_profile, running_executor, write_model
from tests.helpers import PEFT_WARNING
from tests.tiny import NUM_TOKENS, PROMPTS, greedy, tiny_pair, tiny_request, truth

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)
REQUEST = tiny_request("r3", PROMPTS["r3"], NUM_TOKENS)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def stage(connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    known_profile(monkeypatch)
    async with running_executor(connect, model_dir) as stage:
        yield stage


def write_peft(model_dir: Path, folder: Path, **settings: Any) -> list[int]:
    """An adapter as PEFT makes and saves it; returns what the adapted model says."""
    import transformers

    torch.manual_seed(5)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    values: dict[str, Any] = {
        "r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM",
    } | settings  # fmt: skip
    adapted = peft.get_peft_model(plain, peft.LoraConfig(**values)).eval()
    adapted.save_pretrained(str(folder))
    return greedy(adapted, PROMPTS["r3"], NUM_TOKENS)


async def say(stage: Stage, model: str, request_id: str) -> list[int] | str:
    answer = await stage.admit(msgspec.structs.replace(REQUEST, model=model, request_id=request_id))
    return await stage.output(request_id) if isinstance(answer, Admitted) else answer.reason


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(k|v)_proj", "use_rslora": True},
        {"target_modules": ["o_proj", "down_proj", "gate_proj"], "lora_dropout": 0.1, "rank_pattern": {"o_proj": 4}},
    ],
    ids=str,
)
async def test_what_peft_saves_is_served_as_peft_computes_it(
    stage: Stage, model_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    expected = write_peft(model_dir, tmp_path / "theirs", **settings)
    assert expected != truth()["r3"]
    record = await import_folder(stage.client, tmp_path / "theirs", None, None)
    assert (record.name, record.base_model, record.job_id) == ("theirs", MODEL, "")
    assert await say(stage, "theirs", "1") == expected
    await export(stage.client, "theirs", tmp_path / "ours")
    again = await import_folder(stage.client, tmp_path / "ours", "again", None)
    assert again.lora == record.lora
    assert await say(stage, "again", "2") == expected


async def test_a_bottleneck_is_imported_and_served(stage: Stage, model_dir: Path, tmp_path: Path) -> None:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    spec = LoraSpec(method="bottleneck", rank=6, non_linearity="gelu", target_modules=("o_proj", "down_proj"))
    adapter = random_bottleneck(tiny_pair()[1], spec)
    inserted(model, adapter.weights.tensors, spec)
    record = AdapterRecord(name="mine", base_model=str(model_dir), artifact="a", lora=spec, created_at=0.0)
    write_folder(tmp_path / "mine", record, adapter.to_safetensors())
    await import_folder(stage.client, tmp_path / "mine", None, MODEL)
    expected = greedy(model, PROMPTS["r3"], NUM_TOKENS)
    assert await say(stage, "mine", "1") == expected != truth()["r3"]


async def test_a_deleted_adapter_is_gone_with_its_weights(stage: Stage, model_dir: Path, tmp_path: Path) -> None:
    write_peft(model_dir, tmp_path / "a")
    record = await import_folder(stage.client, tmp_path / "a", "mine", MODEL)
    with pytest.raises(AdapterError, match="there is an adapter mine already"):
        await import_folder(stage.client, tmp_path / "a", "mine", None)
    store = await stage.client.object_store(subjects.ARTIFACTS_STORE)
    assert [info.name for info in await store.list(ignore_deletes=True)] == [record.artifact]
    assert (await delete(stage.client, "mine")).name == "mine"
    assert await list_adapters(stage.client) == []
    await stage.poll(lambda: not stage.engine.adapters)
    assert await say(stage, "mine", "1") == "unknown_model"
    assert [info.name for info in await store.list() if not info.deleted] == []
    with pytest.raises(AdapterError, match="no adapter mine; there are: none"):
        await delete(stage.client, "mine")


async def test_an_adapter_of_another_model_leaves_nothing_behind(stage: Stage, model_dir: Path, tmp_path: Path) -> None:
    write_peft(model_dir, tmp_path / "a")
    change_config(tmp_path / "a", base_model_name_or_path="them/other")
    with pytest.raises(AdapterError, match=r"no executor that serves the base model other is ready .*--base-model"):
        await import_folder(stage.client, tmp_path / "a", None, None)
    tensors = safetensors.torch.load((tmp_path / "a" / "adapter_model.safetensors").read_bytes())
    wide = {name: torch.cat([t, t], dim=1) if "lora_A" in name else t for name, t in tensors.items()}
    safetensors.torch.save_file(wide, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"_proj.lora_A.weight has shape \(4, 64\), .* was it made for another model"):
        await import_folder(stage.client, tmp_path / "a", None, MODEL)
    assert await list_adapters(stage.client) == []
    store = await stage.client.object_store(subjects.ARTIFACTS_STORE)
    assert [info.name for info in await store.list() if not info.deleted] == []


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_peft(model_dir, folder)
    return folder


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be one of LORA, IA3, BOTTLENECK, not 'LOHA'"),
        ({"r": 0}, "r must be a number of at least 1, not 0"),
        ({"r": "8"}, "r must be a number of at least 1, not '8'"),
        ({"r": 8}, r"has shape \(4, 32\), but r is 8"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"bias": "lora_only"}, "bias must be none, not 'lora_only'"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"layers_to_transform": [0]}, "layers_to_transform is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is not supported: all modules must have the same r"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type must be CAUSAL_LM"),
        ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, "target_modules names v_proj, of which"),
    ],
)
def test_unsupported_settings_are_named(good: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = copy(good, tmp_path / "a")
    assert read_peft_folder(folder).lora.target_modules == ("q_proj", "up_proj")
    change_config(folder, **changes)
    with pytest.raises(PeftFolderError, match=message):
        read_peft_folder(folder)


def test_damaged_files_are_named(good: Path, tmp_path: Path) -> None:
    folder = copy(good, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    tensors = safetensors.torch.load(whole)
    for data in (
        b"",
        b"garbage",
        whole[:40],
        b"\xff" * 64,
        *((2).to_bytes(8, "little") + header for header in (b"[]", b'"\xff')),
    ):
        path.write_bytes(data)
        with pytest.raises(PeftFolderError, match="not in safetensors format"):
            read_peft_folder(folder)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    for changed, message in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, "lacks a matrix of q_proj in layer 1"),
        (tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, "tensor base_model.model.lm_head"),
        (tensors | {name: torch.zeros(4, 32, dtype=torch.int8)}, "must be a matrix of F32"),
        ({}, "holds no tensor"),
    ):
        safetensors.torch.save_file(changed, path)
        with pytest.raises(PeftFolderError, match=message):
            read_peft_folder(folder)
    path.write_bytes(whole)
    with pytest.raises(PeftFolderError, match="the limit is 10"):
        read_peft_folder(folder, max_bytes=10)
    path.unlink()
    with pytest.raises(PeftFolderError, match=r"has no adapter_model\.safetensors"):
        read_peft_folder(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(PeftFolderError, match="not readable as JSON"):
        read_peft_folder(folder)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_peft_folder(tmp_path / "nowhere")


async def test_without_an_executor_the_import_says_so(bus: Bus, good: Path) -> None:
    with pytest.raises(AdapterError, match="no executor that serves the base model tiny is ready"):
        await import_folder(bus, good, None, None)
    with pytest.raises(AdapterError, match="there is no folder"):
        await import_folder(bus, good / "nowhere", None, None)


def test_names_of_base_models_are_compared_by_their_last_part() -> None:
    assert is_same_model("HuggingFaceTB/SmolLM2-135M", "/models/smollm2-135m", "x")
    assert not is_same_model("HuggingFaceTB/SmolLM2-135M", "SmolLM2-360M")


async def test_the_commands_import_list_and_delete(
    stage: Stage, nats_server: NatsServer, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def heddle(*arguments: str) -> str:
        await asyncio.to_thread(main, ["adapters", *arguments, "--nats", nats_server.url])
        return capsys.readouterr().out

    assert "mine: served as an adapter of tiny, rank 4\n" in await heddle("import", str(good), "--name", "mine")
    assert "mine" in await heddle("list")
    assert "mine: deleted\n" in await heddle("delete", "mine")
    assert "no adapters yet" in await heddle("list")
    with pytest.raises(SystemExit, match="heddle: no adapter mine; there are: none"):
        await heddle("delete", "mine")
