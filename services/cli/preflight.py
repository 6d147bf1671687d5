"""What must hold before `heddle up` starts anything: a free port, a state directory of its own, a model that can be read."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.drafts import parse_drafts
from common.messages import Role
from kernels.cache import cache_dir
from kernels.drafting.folder import WEIGHTS, DrafterFilesError, read_config
from services.cli.layout import Model
from services.cli.models import ModelError, check_safetensors, locate, usable_folder
from services.cli.parent_death import die_with_parent


class UpError(RuntimeError):
    """`heddle up` cannot start; the message says why and what to do."""


def say(line: str) -> None:
    """One line for the user, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def check_replicas(replicas: Mapping[Role, int], nats: str | None) -> None:
    """Raises UpError for a stack without one of its services, or for no process at all."""
    if nats is None and (missing := next((role for role, number in replicas.items() if number == 0), None)):
        raise UpError(
            f"--{missing}s 0 needs --nats URL, of a system that has one: a system of its own has one of each at least"
        )
    if replicas and not any(replicas.values()):
        raise UpError("there is nothing to start: all numbers of services are 0")


def check_port(host: str, port: int, option: str = "--port") -> None:
    """Raises UpError, naming the option that chose the port, when nothing could listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UpError(f"port {port} on {host} cannot be used ({error.strerror}); choose another with {option}") from error


def check_drafters(draft: str) -> None:
    """Raises UpError or ModelError, naming the folder, when one of these drafters' cannot be read."""
    for spec in parse_drafts(draft):
        folder = Path(spec.folder)
        if spec.kind == "features":
            try:
                read_config(folder)
            except DrafterFilesError as error:
                raise UpError(f"--draft {spec}: {error}") from error
            check_safetensors(folder / WEIGHTS)
        elif spec.kind == "model" and not (folder / "config.json").is_file():
            raise UpError(f"--draft {spec}: {folder} has no config.json")


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
