"""What must hold before `heddle up` starts anything: a free port, a state directory of its own, a model that can be read."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kernels.cache import cache_dir
from services.cli.layout import Model
from services.cli.models import ModelError, locate, usable_folder
from services.cli.parent_death import die_with_parent


class UpError(RuntimeError):
    """`heddle up` cannot start; the message says why and what to do."""


def say(line: str) -> None:
    """One line for the user, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def check_port(host: str, port: int, option: str = "--port") -> None:
    """Raises UpError, naming the option that chose the port, when nothing could listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UpError(f"port {port} on {host} cannot be used ({error.strerror}); choose another with {option}") from error


@contextlib.contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Holds the state directory for this process. Raises UpError when another one does."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "lock").open("a+")
    except OSError as error:
        raise UpError(f"state directory {state_dir} cannot be used: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip()
            raise UpError(f"{state_dir} is in use by process {holder}; choose another with --state-dir") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def prepare_model(model: str, served_name: str | None) -> Model:
    """The folder to serve, converted in a process of its own when it has to be. Raises ModelError."""
    source = locate(model)
    folder = usable_folder(source, cache_dir())
    if folder is None:
        say(f"converting {source.name} once into {cache_dir()}; this takes about half a minute for the default model")
        folder = _convert(model)
    return Model(name=served_name or source.name, folder=folder)


def _convert(model: str) -> Path:
    command = [sys.executable, "-m", "services.cli.convert", model]
    result = subprocess.run(command, capture_output=True, text=True, process_group=0, preexec_fn=die_with_parent(), check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"conversion ended with status {result.returncode}"]
        raise ModelError(lines[-1].removeprefix("heddle: "))
    return Path(result.stdout.splitlines()[-1])
