"""`heddle finetune` against a real gateway, trainer and executor with a tiny model, and what it shows of made-up jobs."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.bus import Bus
from common.messages import LoraSpec
from services.cli.__main__ import main
from services.cli.finetune import FinetuneError, FinetuneOptions, Gateway, bar_fields, body, line, outcome, watch
from tests.gateway_stage import Connect, running_gateway
from tests.trainer_fakes import MODEL, example, write_model_dir
from tests.trainer_world import World

DATA = b"".join(example("answer " * (i + 1)) for i in range(5))


@pytest.fixture
async def world(connect: Connect, bus: Bus, tmp_path: Path) -> AsyncIterator[World]:
    made = World(connect, bus, write_model_dir(tmp_path / "model"))
    yield made
    await made.end()


async def run(*arguments: str) -> tuple[int, str, str]:
    """Exit status and output of the command."""
    command = (sys.executable, "-m", "services.cli", "finetune", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_a_dataset_becomes_a_served_adapter(world: World, connect: Connect, tmp_path: Path) -> None:
    await world.trainer()
    executor = await world.executor()
    (tmp_path / "data.jsonl").write_bytes(DATA)
    (tmp_path / "held.jsonl").write_bytes(DATA)
    (tmp_path / "bad.jsonl").write_bytes(DATA + b"nonsense\n")
    async with running_gateway(await connect(), tmp_path / "model", served_model_name=MODEL) as gateway:
        where = ("--url", gateway.url, "--wait")
        options = (
            "--suffix mine --epochs 2 --batch-size 2 --rank 4 --method rslora --dropout 0.1 --target-modules q_proj v_proj"
        )
        status, out, err = await run(
            str(tmp_path / "data.jsonl"), "--validation", str(tmp_path / "held.jsonl"), *options.split(), *where
        )
        assert (status, err) == (0, "")
        lines = out.splitlines()
        assert lines[0].startswith("job ftjob-")
        assert any(re.match(r"Step 5/6: training loss=0\.2000, [\d,]+ tokens/s", each) for each in lines)
        assert "Epoch 1/2 completed, full validation loss=7.0000" in lines
        assert lines[-1].startswith("ft:base::mine:")
        lora = executor.opened[0].lora
        assert (lora.rank, lora.use_rslora, lora.dropout, lora.target_modules) == (4, True, 0.1, ("q_proj", "v_proj"))
        bottleneck = "--method bottleneck --rank 5 --non-linearity gelu --target-modules down_proj --epochs 1"
        assert (await run(str(tmp_path / "data.jsonl"), *bottleneck.split(), *where))[0] == 0
        wanted = LoraSpec(method="bottleneck", rank=5, non_linearity="gelu", target_modules=("down_proj",))
        assert executor.opened[1].lora == wanted

        status, _, err = await run(str(tmp_path / "bad.jsonl"), *where)
        assert (status, err.startswith("heddle: the job failed: line 6: ")) == (1, True)
        status, _, err = await run(str(tmp_path / "data.jsonl"), "--rank", "1000", *where)
        assert (status, err.startswith("heddle: lora.rank: ")) == (1, True)
    status, _, err = await run(str(tmp_path / "none.jsonl"), "--url", "http://127.0.0.1:1")
    assert (status, "there is no file" in err) == (1, True)


def test_the_bar_shows_the_newest_step_and_the_time_left() -> None:
    job: dict[str, Any] = {"status": "running", "step": 3, "total_steps": 90, "estimated_finish": 1_000_075}
    metrics = [{"type": "metrics", "data": {"step": s, "train_loss": 1 / s, "tokens_per_second": 1234.5}} for s in (3, 4)]
    assert bar_fields(job, [{"type": "message"}, *metrics], 1_000_000.0) == {
        "description": "running", "completed": 4, "total": 90, "left": "1:15 left", "loss": "loss 0.2500",
        "pace": "1,234 tokens/s",
    }  # fmt: skip
    queued: dict[str, Any] = {"status": "queued", "step": 0, "total_steps": 0, "estimated_finish": None}
    assert bar_fields(queued, [], 0.0) == {"description": "queued", "completed": 0, "total": None, "left": ""}


def test_a_line_tells_pace_and_time_left_of_a_step_alone() -> None:
    job: dict[str, Any] = {"status": "running", "step": 3, "total_steps": 90, "estimated_finish": 1_000_075}
    data = {"step": 4, "train_loss": 0.25, "tokens_per_second": 1234.5}
    step = {"type": "metrics", "message": "Step 4/90: training loss=0.2500", "data": data}
    assert line(job, step, 1_000_000.0) == "Step 4/90: training loss=0.2500, 1,234 tokens/s, 1:15 left"
    assert line(job | {"estimated_finish": None}, step, 0.0) == "Step 4/90: training loss=0.2500, 1,234 tokens/s"
    assert line(job, {"type": "message", "message": "Epoch 1/2 completed"}, 0.0) == "Epoch 1/2 completed"


def test_every_event_is_seen_once_though_the_gateway_is_away_for_a_while() -> None:
    events: list[dict[str, Any]] = []
    polls = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal polls
        if not request.url.path.endswith("/events"):
            polls += 1
            if polls == 2:
                return httpx.Response(503, json={"error": {"message": "starting"}})
            first = len(events)
            events.extend({"id": f"e{i}", "message": f"m{i}"} for i in range(first, first + 3))
            return httpx.Response(200, json={"status": "succeeded" if polls == 4 else "running"})
        newest = events[::-1]
        after = request.url.params["after"]
        start = [event["id"] for event in newest].index(after) + 1 if after else 0
        return httpx.Response(200, json={"data": newest[start : start + 2], "has_more": start + 2 < len(newest)})

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://gateway") as client:
        seen = [event["id"] for _, new in watch(Gateway(client), "job", sleep=lambda _: None) for event in new]
    assert seen == [f"e{i}" for i in range(9)]


def test_what_is_no_gateway_is_named() -> None:
    html = httpx.MockTransport(lambda _: httpx.Response(200, text="<html>"))
    with (
        httpx.Client(transport=html, base_url="http://other") as client,
        pytest.raises(FinetuneError, match="no Heddle gateway"),
    ):
        Gateway(client).job("x")


def test_a_distillation_asks_for_a_drafter_and_writes_its_folder(tmp_path: Path) -> None:
    options = FinetuneOptions(
        data=tmp_path, validation=None, model=None, suffix=None, seed=None, epochs=2, batch_size=None, lora={}, wait=False,
        url="http://gateway", api_key=None, drafter={"vocabulary_size": 99, "num_steps": None}, out=tmp_path / "drafter",
    )  # fmt: skip
    asked = body(options, "m", {"training_file": "file-1"})
    hyperparameters = {"n_epochs": 2, "vocabulary_size": 99}
    assert asked["method"] == {"type": "distillation", "distillation": {"hyperparameters": hyperparameters}}
    assert "lora" not in asked
    names = {"f1": "step_metrics.csv", "f2": "config.json", "f3": "drafter.safetensors", "f4": "README.md"}

    def answer(request: httpx.Request) -> httpx.Response:
        file_id, _, part = request.url.path.removeprefix("/v1/files/").partition("/")
        return httpx.Response(200, content=f"of {file_id}") if part else httpx.Response(200, json={"filename": names[file_id]})

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://gateway") as client:
        text = outcome(options, Gateway(client), {"result_files": list(names)})
    written = {path.name: path.read_text() for path in (tmp_path / "drafter").iterdir()}
    assert written == {"config.json": "of f2", "drafter.safetensors": "of f3", "README.md": "of f4"}
    assert text.endswith(f"--draft ngram,features:{tmp_path / 'drafter'}")


def test_a_folder_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is a folder, not a JSONL file"):
        main(["finetune", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--method", "distillation", "--rank", "4"], "--rank does not belong to --method distillation"),
        (["--out", "x"], "belong to --method distillation"),
        (["--method", "distillation", "--out", "."], "is not an empty folder"),
    ],
)
def test_options_of_another_method_are_refused(tmp_path: Path, arguments: list[str], reason: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(DATA)
    with pytest.raises(SystemExit, match=reason):
        main(["finetune", str(tmp_path / "data.jsonl"), *arguments])
