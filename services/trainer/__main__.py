"""Entry point of the trainer process."""

from common.service import main as run_service
from services.trainer.actor import TrainerActor
from services.trainer.config import TrainerConfig


def main() -> None:
    """Run the trainer until it is asked to stop."""
    run_service("trainer", TrainerConfig, TrainerActor)


if __name__ == "__main__":
    main()
