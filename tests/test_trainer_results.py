"""What a finished job leaves to look at: a table of steps, TensorBoard files, and the live TensorBoard folder."""

from __future__ import annotations

import csv
import io
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common import subjects
from common.artifacts import read_object
from common.bus import Bus
from services.trainer import tensorboard
from services.trainer.board import Board
from tests.executor_stage import Connect
from tests.trainer_fakes import example, write_model_dir
from tests.trainer_world import World

DATA = b"".join(example("answer " * (i + 1)) for i in range(5))
TENSORBOARDX = bytes.fromhex(
    "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe9100000000000000095fbfe180900006040fc54d941"
    "10ac023a020801312d1a8d3d000000000000006049f1ec0900008040fc54d94110ad022a2f0a110a0a747261696e2f6c6f7373150000003e0a1a0a1374"
    "7261696e2f6c6561726e696e675f726174651517b75139b5e7992c"
)
"""What tensorboardX 2.6.5 writes for the three records below."""


@pytest.fixture
async def world(connect: Connect, bus: Bus, tmp_path: Path) -> AsyncIterator[World]:
    made = World(connect, bus, write_model_dir(tmp_path / "model"))
    await made.upload(DATA)
    yield made
    await made.end()


def num_records(data: bytes) -> int:
    """Frames of an event file, which they must fill."""
    count, offset = 0, 0
    while offset < len(data):
        offset += 8 + 4 + struct.unpack_from("<Q", data, offset)[0] + 4
        count += 1
    assert offset == len(data)
    return count


def test_event_files_are_tensorboards_to_the_byte() -> None:
    values = {"train/loss": 0.125, "train/learning_rate": 2e-4}
    ours = tensorboard.header(1700000000.25) + tensorboard.restart(1700000001.5, 300)
    assert ours + tensorboard.scalars(1700000002.0, 301, values) == TENSORBOARDX


async def test_a_finished_job_has_its_metrics_as_files(world: World, tmp_path: Path) -> None:
    await world.trainer(tensorboard_dir=tmp_path / "board")
    await world.executor()
    job = await world.create(validation_file="file-1")
    done = await world.until_status(job.id, "succeeded")
    store = await world.bus.object_store(subjects.FILES_STORE)
    table, board = [await read_object(store, file_id, 5.0) for file_id in done.result_files]
    rows = list(csv.DictReader(io.StringIO(table.decode())))
    assert [float(row["train_loss"]) for row in rows] == pytest.approx([1 / step for step in range(1, 7)])
    assert [(row["step"], row["valid_loss"]) for row in rows] == [
        (str(step), {3: "7.0", 6: "4.0"}.get(step, "")) for step in range(1, 7)
    ]
    assert num_records(board) == 1 + 6
    assert b"validation/loss" in board
    (live,) = (tmp_path / "board" / job.id).iterdir()
    assert num_records(live.read_bytes()) == 2 + 6 + 2, "steps 3 and 6 are told again with their evaluation"


async def test_a_job_that_goes_on_elsewhere_continues_its_curve(world: World, tmp_path: Path) -> None:
    await world.trainer(tensorboard_dir=tmp_path / "board")
    executor = await world.executor(permits=4)
    job = await world.create()
    await world.until(job.id, lambda record: record.job.step == 4)
    await executor.die()
    await world.executor("y")
    await world.until_status(job.id, "succeeded")
    first, second = sorted((tmp_path / "board" / job.id).iterdir(), key=lambda path: path.name.rsplit(".")[-1])
    assert (num_records(first.read_bytes()), num_records(second.read_bytes())) == (2 + 4, 2 + 3)


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    board = Board(tmp_path / "file", "job", "t")
    board.begin(0)
    board.step({"step": 1, "train_loss": 1.0})
