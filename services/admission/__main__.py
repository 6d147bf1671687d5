"""Starts admission as a process; knows nothing else."""

from common import service
from services.admission.actor import AdmissionActor
from services.admission.config import AdmissionConfig


def main() -> None:
    """Entry point of `python -m services.admission`."""
    service.main("admission", AdmissionConfig, AdmissionActor)


if __name__ == "__main__":
    main()
