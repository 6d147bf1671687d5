"""The TensorBoard folder of a running job, for those who watch. Knows files; a disk that fails costs the job nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from services.trainer import results, tensorboard

log = structlog.get_logger()


class Board:
    """Appends a job's steps to `<folder>/<job>/events.out.tfevents.*`; without a folder it does nothing."""

    def __init__(self, folder: Path | None, job_id: str, instance_id: str) -> None:
        self._folder = None if folder is None else folder / job_id
        self._suffix = instance_id
        self._file: Path | None = None

    def begin(self, step: int) -> None:
        """Steps from `step` on will be told (again): a new file, before which readers forget what older ones say of them."""
        if self._folder is None:
            return
        now = time.time()
        with self._tolerant():
            self._folder.mkdir(parents=True, exist_ok=True)
            number = len(list(self._folder.iterdir()))
            self._file = self._folder / f"events.out.tfevents.{int(now):010}.{self._suffix}.{number}"
            self._file.write_bytes(tensorboard.header(now) + tensorboard.restart(now, step + 1))

    def step(self, data: Mapping[str, Any]) -> None:
        """One step's metrics."""
        if self._file is None:
            return
        with self._tolerant(), self._file.open("ab") as file:
            file.write(results.step_record(time.time(), data))

    def _tolerant(self) -> contextlib.AbstractContextManager[None]:
        return _logged(str(self._folder))


@contextlib.contextmanager
def _logged(folder: str) -> Any:
    try:
        yield
    except OSError as error:
        log.warning("tensorboard.not_written", folder=folder, error=error.strerror)
