"""Entry point of `python -m services.gateway`."""

from common.service import main as run_service
from services.gateway.actor import GatewayActor
from services.gateway.config import GatewayConfig


def main() -> None:
    """Run a gateway until a signal asks to stop."""
    run_service("gateway", GatewayConfig, GatewayActor)


if __name__ == "__main__":
    main()
