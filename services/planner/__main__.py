"""Starts a planner as a process; knows nothing else."""

import os

# A neural drafter's OpenMP workers share the cores with an executor's: they must not spin for long after a draft. Torch reads
# this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from common import service
from services.planner.actor import PlannerActor
from services.planner.config import PlannerConfig


def main() -> None:
    """Entry point of `python -m services.planner`."""
    service.main("planner", PlannerConfig, PlannerActor)


if __name__ == "__main__":
    main()
