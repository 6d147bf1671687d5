"""vLLM's endpoints that load and unload adapters at run time, and what the metrics say of adapters."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import safetensors.torch
import torch
from nats.js.errors import NotFoundError

from common import subjects
from common.bus import Bus
from common.codec import encode
from common.config import load_config
from common.messages import (
    AdapterChecked,
    AdapterRecord,
    CheckAdapter,
    FineTuningJob,
    JobQuery,
    JobStatus,
    LoraSpec,
    Rejected,
)
from services.gateway.config import GatewayConfig
from tests.fakes import MODEL, SAID, write_tiny_model
from tests.gateway_stage import Connect, Stage, staged

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def write_adapter(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": MODEL}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.ones(2, 8), key.format("B"): torch.ones(8, 2)}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


async def judge(bus: Bus) -> list[AdapterRecord]:
    """Answers for an executor: it refuses adapters whose alpha is 666. Returns what it was asked."""
    asked = []

    async def on_check(message: CheckAdapter) -> AdapterChecked | Rejected:
        asked.append(message.record)
        if message.record.lora.alpha == 666:
            return Rejected(reason="invalid", message="tensor q has shape (1, 2)")
        return AdapterChecked(name=message.record.name)

    await bus.subscribe(subjects.check_adapter(MODEL), CheckAdapter, on_check, queue="executor")
    await bus.flush()
    return asked


@pytest.fixture
async def stage(connect: Connect, model_dir: Path, tmp_path: Path) -> AsyncIterator[Stage]:
    settings: dict[str, Any] = {"allow_runtime_lora_updating": True, "lora_dir": str(tmp_path / "loras"), "api_key": "sesame"}
    write_adapter(tmp_path / "loras" / "good")
    async with staged(connect, model_dir, **settings) as stage:
        yield stage


async def ask(stage: Stage, path: str, **body: Any) -> tuple[int, str]:
    response = await stage.http.post(path, json=body)
    is_text = response.headers["content-type"].startswith("text/plain")
    return response.status_code, response.text if is_text else response.json()["error"]["message"]


async def test_an_adapter_is_loaded_served_and_unloaded(stage: Stage, tmp_path: Path) -> None:
    asked = await judge(stage.bus)
    added = await ask(stage, LOAD, lora_name="mine", lora_path="good")
    assert added == (200, "Success: LoRA adapter 'mine' added successfully.")
    assert asked[0].lora == LoraSpec(rank=2, alpha=4.0, target_modules=("q_proj",))
    card = (await stage.http.get("/v1/models/mine")).json()
    assert (card["id"], card["parent"]) == ("mine", MODEL)
    answer = await stage.openai.completions.create(model="mine", prompt="one", max_tokens=64)
    assert answer.choices[0].text == SAID
    assert stage.executor.requests[0].base_model == MODEL
    again = await ask(stage, LOAD, lora_name="mine", lora_path=str(tmp_path / "loras" / "good"))
    assert again == (400, "The lora adapter 'mine' has already been loaded.")
    removed = await ask(stage, UNLOAD, lora_name="mine")
    assert removed == (200, "Success: LoRA adapter 'mine' removed successfully.")
    assert (await stage.http.get("/v1/models/mine")).status_code == 404
    assert await ask(stage, UNLOAD, lora_name="mine") == (404, "The lora adapter 'mine' cannot be found.")


async def test_what_cannot_be_loaded_is_told(stage: Stage, tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    write_adapter(loras / "refused", lora_alpha=666)
    write_adapter(loras / "dora", use_dora=True)
    write_adapter(loras / "other", base_model_name_or_path="them/another")
    write_adapter(tmp_path / "outside")
    (loras / "link").symlink_to(tmp_path / "outside")
    assert await ask(stage, LOAD, lora_name="x", lora_path="good") == (
        400,
        f"no executor that serves the base model {MODEL} is ready.",
    )
    await judge(stage.bus)
    for path, status, message in (
        ("", 400, "Both 'lora_name' and 'lora_path' must be provided."),
        ("nowhere", 404, "No adapter found at 'nowhere'."),
        ("../outside", 403, "lora_path is not below"),
        (str(tmp_path / "outside"), 403, "lora_path is not below"),
        ("link", 403, "lora_path is not below"),
        ("refused", 400, "tensor q has shape (1, 2)"),
        ("dora", 400, "use_dora is not supported"),
        ("other", 400, "base_model_name_or_path is 'them/another'"),
    ):
        answer = await ask(stage, LOAD, lora_name="x", lora_path=path)
        assert answer[0] == status, answer
        assert message in answer[1]
    assert (await ask(stage, LOAD, lora_name=MODEL, lora_path="good"))[0] == 400
    assert (await ask(stage, LOAD, lora_name="x", lora_path="other", base_model_name="third"))[0] == 400
    assert (await ask(stage, UNLOAD))[0] == 400
    assert (await stage.http.get("/v1/models")).json()["data"][1:] == []
    assert (await ask(stage, LOAD, lora_name="x", lora_path="other", base_model_name=MODEL))[0] == 200


async def test_the_key_is_asked_for_and_what_a_job_made_is_not_unloaded(stage: Stage) -> None:
    response = await stage.http.post(LOAD, json={"lora_name": "x", "lora_path": "good"}, headers={"authorization": "none"})
    assert response.status_code == 401
    trained = AdapterRecord(name="ft", base_model=MODEL, artifact="a", lora=LoraSpec(), created_at=1.0, job_id="ftjob-1")
    await (await stage.bus.key_value(subjects.ADAPTERS_BUCKET)).put(subjects.adapter_key("ft"), encode(trained))
    status, message = await ask(stage, UNLOAD, lora_name="ft")
    assert (status, "made by the job ftjob-1" in message) == (400, True)


async def announced(stage: Stage, name: str, **fields: Any) -> None:
    """Wait until the gateway lists an adapter that a job made."""
    record = AdapterRecord(name=name, base_model=MODEL, artifact=name, lora=LoraSpec(), created_at=1.0, **fields)
    await (await stage.bus.object_store(subjects.ARTIFACTS_STORE)).put(name, b"weights")
    await (await stage.bus.key_value(subjects.ADAPTERS_BUCKET)).put(subjects.adapter_key(name), encode(record))
    await stage.until("/v1/models", lambda listing: name in [model["id"] for model in listing["data"]])


async def test_a_model_is_deleted_with_openais_client(connect: Connect, model_dir: Path) -> None:
    status: list[JobStatus] = ["running"]

    async def on_get(query: JobQuery) -> FineTuningJob:
        about: dict[str, Any] = {"model": MODEL, "training_file": "f", "hyperparameters": {}, "lora": {}, "seed": 1}
        return FineTuningJob(id=query.job_id, created_at=1, status=status[0], **about)

    async with staged(connect, model_dir) as stage:
        await announced(stage, "ft:tiny::my/loom:1", job_id="ftjob-1")
        with pytest.raises(openai.InternalServerError, match="no trainer can tell") as untold:
            await stage.openai.models.delete("ft:tiny::my/loom:1")
        assert (untold.value.status_code, untold.value.code) == (503, "no_trainer")
        await stage.bus.subscribe(subjects.finetune("get"), JobQuery, on_get, queue="trainer")
        await stage.bus.flush()
        with pytest.raises(openai.ConflictError, match="may resume from"):
            await stage.openai.models.delete("ft:tiny::my/loom:1")
        status[0] = "succeeded"
        deleted = await stage.openai.models.delete("ft:tiny::my/loom:1")
        assert (deleted.id, deleted.object, deleted.deleted) == ("ft:tiny::my/loom:1", "model", True)
        assert [model.id async for model in stage.openai.models.list()] == [MODEL]
        with pytest.raises(NotFoundError):
            await (await stage.bus.object_store(subjects.ARTIFACTS_STORE)).get_info("ft:tiny::my/loom:1")
        with pytest.raises(openai.NotFoundError) as unknown:
            await stage.openai.models.delete("ft:tiny::my/loom:1")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.PermissionDeniedError, match="base model"):
            await stage.openai.models.delete(MODEL)


async def test_a_deletion_needs_the_key(stage: Stage) -> None:
    await announced(stage, "mine")
    refused = await stage.http.delete("/v1/models/mine", headers={"authorization": "Bearer wrong"})
    assert refused.status_code == 401
    assert (await stage.http.delete("/v1/models/mine")).json() == {"id": "mine", "object": "model", "deleted": True}


async def test_the_endpoints_are_off_unless_they_are_allowed(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        assert (await stage.http.post(LOAD, json={})).status_code == 404


async def test_allowed_without_a_folder_nothing_is_read(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, allow_runtime_lora_updating=True) as stage:
        assert (await ask(stage, LOAD, lora_name="x", lora_path="/"))[0] == 403


def test_vllms_variable_allows_them_too(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"HEDDLE_GATEWAY_MODEL_DIR": str(model_dir)}
    assert not load_config(GatewayConfig, "gateway", environ).allow_runtime_lora_updating
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    assert load_config(GatewayConfig, "gateway", environ).allow_runtime_lora_updating
    own = environ | {"HEDDLE_GATEWAY_ALLOW_RUNTIME_LORA_UPDATING": "0"}
    assert not load_config(GatewayConfig, "gateway", own).allow_runtime_lora_updating


async def test_metrics_name_the_adapters_that_run_and_wait(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        stage.executor.load_fields = {"max_loras": 4, "running_adapters": ("a", "b"), "waiting_adapters": ("c",)}
        await stage.executor.beat()
        await stage.until("/status", lambda status: status["services"][0]["load"]["executor"]["max_loras"] == 4)
        lines = (await stage.http.get("/metrics")).text.splitlines()
        (line,) = (line for line in lines if line.startswith("vllm:lora_requests_info{"))
        assert 'max_lora="4"' in line
        assert 'running_lora_adapters="a,b"' in line
        assert 'waiting_lora_adapters="c"' in line
