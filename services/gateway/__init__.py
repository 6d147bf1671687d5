"""The gateway: the system's front door for OpenAI clients over HTTP and over NATS."""
