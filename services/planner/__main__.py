"""Starts a planner as a process; knows nothing else."""

from common import service
from services.planner.actor import PlannerActor
from services.planner.config import PlannerConfig


def main() -> None:
    """Entry point of `python -m services.planner`."""
    service.main("planner", PlannerConfig, PlannerActor)


if __name__ == "__main__":
    main()
