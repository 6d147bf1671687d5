"""Entry point: python -m services.executor."""

import os

# OpenMP's workers wait at every operation's end. Spinning for long starves the other services of this machine when they
# need the core, sleeping at once costs a wake-up per operation: measured on 2 cores with both busy, a pass of 16 tokens takes
# 30 ms with the default, 42 ms when passive, 26 ms with this. Must be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from common.service import main as run
from services.executor.actor import ExecutorActor
from services.executor.config import ExecutorConfig


def main() -> None:
    """Run one executor until a signal stops it."""
    run("executor", ExecutorConfig, ExecutorActor)


if __name__ == "__main__":
    main()
