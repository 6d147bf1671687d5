"""What all services share: messages, subjects, the bus, configuration and pure models of latency. No torch."""
