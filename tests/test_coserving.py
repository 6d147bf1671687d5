"""Finetuning beside chat on the real model: upload, train, keep the SLO, serve the result, load it with PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from common.messages import LoraSpec
from services.executor.batch import Segment, build_batch
from services.executor.loader import load_decoder
from services.executor.lora import LoraAdapter
from services.executor.model import KvCache
from tests.stack import Stack, eventually

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]

HUMANEVAL = Path(__file__).parent / "data" / "humaneval20.jsonl"
NUM_PROBLEMS = 10
"""So many that a job takes a minute or two beside chat on two cores without bf16 units."""
FEWEST_CHATS, MOST_JOBS = 3, 6
"""Jobs follow each other until so many chats ran beside them: a fast machine ends one within two chats."""
LEAST_TPOT_MS, TIMES_ALONE = 150.0, 4.0
"""The target is the larger of this and so many times what a chat alone takes: how fast the machine is, is not tested."""
MOST_CHATS = 12
"""Then the job has the machine alone: on a slow one, chats within their targets would leave it nothing for ever."""


@pytest.fixture(scope="module")
def stack(real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(real_model_dir, tmp_path_factory.mktemp("coserving") / "state").start()
    yield running
    running.stop()


def dataset(path: Path) -> Path:
    """Chat rows of HumanEval problems and their solutions."""
    problems = [json.loads(line) for line in HUMANEVAL.read_text().splitlines()[:NUM_PROBLEMS]]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Complete this Python function:\n" + problem["prompt"]},
                {"role": "assistant", "content": problem["canonical_solution"]},
            ]
        }
        for problem in problems
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Chats(threading.Thread):
    """One chat stream after another until told to stop; the TPOT of each as the client saw it."""

    def __init__(self, client: openai.OpenAI) -> None:
        super().__init__(daemon=True)
        self.tpots_ms: list[float] = []
        self.failures: list[Exception] = []
        self.enough = threading.Event()
        self._client = client
        self.target_ms = LEAST_TPOT_MS
        self.target_ms = max(LEAST_TPOT_MS, TIMES_ALONE * max(self._one() for _ in range(2)))

    def run(self) -> None:
        while not self.enough.is_set() and len(self.tpots_ms) < MOST_CHATS:
            try:
                self.tpots_ms.append(self._one())
            except openai.OpenAIError as error:
                self.failures.append(error)
                return

    def _one(self) -> float:
        times, usage = [], None
        stream = self._client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": f"Tell me a story about the number {len(self.tpots_ms)}."}],
            max_tokens=48,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"x-slo-tpot-ms": str(self.target_ms)},
        )
        for chunk in stream:
            if chunk.choices:
                times.append(time.monotonic())
            usage = chunk.usage or usage
        assert usage is not None
        return (times[-1] - times[0]) / max(1, usage.completion_tokens - 1) * 1e3


def test_an_adapter_is_trained_beside_chat_and_served_at_once(stack: Stack, tmp_path: Path, real_model_dir: Path) -> None:
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=120)
    chats = Chats(client)
    with dataset(tmp_path / "humaneval.jsonl").open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    chats.start()
    try:
        done = _train(client, uploaded.id)
        for _ in range(MOST_JOBS - 1):
            if len(chats.tpots_ms) >= FEWEST_CHATS or chats.failures:
                break
            done = _train(client, uploaded.id)
    finally:
        chats.enough.set()
        chats.join(60)
    assert not chats.failures
    assert len(chats.tpots_ms) >= FEWEST_CHATS, "the jobs ended before chat could be judged"
    num_missed = sum(tpot > chats.target_ms for tpot in chats.tpots_ms)
    assert num_missed <= max(1, 0.1 * len(chats.tpots_ms)), (chats.target_ms, chats.tpots_ms)

    losses = _losses(client, done.id)
    assert len(losses) == 10
    assert sum(losses[-3:]) / 3 < 0.9 * sum(losses[:3]) / 3, losses

    name = done.fine_tuned_model
    assert name in [model.id for model in client.models.list()]
    answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hello"}], max_tokens=8)
    assert answer.model == name
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0

    folder = tmp_path / "adapter"
    command = [sys.executable, "-m", "services.cli", "adapters", "export", name, str(folder), "--url", stack.url]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    _check_against_peft(folder, real_model_dir)
    client.close()


def test_a_bad_dataset_is_refused_with_line_numbers(stack: Stack, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\nnot json\n')
    with path.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="smollm2", training_file=uploaded.id)
    failed = eventually(lambda: _ended(client, job.id))
    assert failed.status == "failed"
    assert "line 2" in failed.error.message
    client.close()


def test_iterations_tell_what_they_held(stack: Stack) -> None:
    counters = stack.services("executor")[0]["load"]
    kinds = ("decode_tokens", "draft_tokens", "prefill_tokens", "finetune_tokens", "backward_tokens", "iterations")
    assert all(counters[kind] > 0 for kind in kinds)
    lines = [
        json.loads(line) for log in (stack.state_dir / "logs").glob("executor*.log") for line in log.read_text().splitlines()
    ]
    held = [line for line in lines if line.get("event") == "iteration"]
    assert any(line["decode"] and line["finetune"] for line in held)
    assert all({"decode", "draft", "prefill", "finetune", "ms"} <= set(line) for line in held)
    metrics = httpx.get(f"{stack.url}/metrics").text
    assert "heddle_executor_finetune_tokens" in metrics


def _train(client: openai.OpenAI, file_id: str) -> Any:
    """A job that succeeded."""
    job = client.fine_tuning.jobs.create(
        model="smollm2",
        training_file=file_id,
        suffix="humaneval",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 2}}},
        extra_body={
            "lora": {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "learning_rate": 1e-3}
        },
    )
    done = eventually(lambda: _ended(client, job.id), 240)
    assert done.status == "succeeded", done.error
    assert done.trained_tokens
    return done


def _ended(client: openai.OpenAI, job_id: str) -> Any:
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job if job.status in ("succeeded", "failed", "cancelled") else None


def _losses(client: openai.OpenAI, job_id: str) -> list[float]:
    events = [event for event in client.fine_tuning.jobs.list_events(job_id, limit=100) if event.type == "metrics"]
    data: list[Any] = [event.data for event in reversed(events)]
    return [float(item["train_loss"]) for item in data]


def _check_against_peft(folder: Path, model_dir: Path) -> None:
    """The exported folder gives the same logits in PEFT as in our engine (fp32, 1e-4)."""
    import peft
    import transformers

    tokens = list(range(100, 140))
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        expected = adapted(torch.tensor([tokens])).logits[0]
    config = json.loads((folder / "adapter_config.json").read_text())
    spec = LoraSpec(rank=config["r"], alpha=config["lora_alpha"], target_modules=tuple(config["target_modules"]))
    decoder = load_decoder(model_dir, torch.float32, torch.device("cpu"))
    data = (folder / "adapter_model.safetensors").read_bytes()
    adapter = LoraAdapter.from_safetensors("trained", spec, data, decoder.config)
    rows = range(len(tokens))
    segment = Segment(tokens=tokens, positions=rows, context_slots=(), slots=rows, adapter=adapter, wants_logits="all")
    with torch.inference_mode():
        hidden = decoder.forward(
            build_batch([segment], decoder.device), KvCache(decoder.config, len(tokens), decoder.dtype, decoder.device)
        )
        actual = decoder.logits(hidden)
        plain = decoder.logits(
            decoder.forward(
                build_batch([Segment(tokens=tokens, positions=rows, context_slots=(), slots=rows)], decoder.device),
                KvCache(decoder.config, len(tokens), decoder.dtype, decoder.device),
            )
        )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1, "the adapter changes nothing"
