"""Settings of the gateway and their limits. Knows no transport."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from common.config import ServiceConfig, require
from common.messages import Slo


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatewayConfig(ServiceConfig):
    """Read from HEDDLE_GATEWAY_<FIELD>, else HEDDLE_<FIELD>."""

    model_dir: str
    """Hugging Face folder of the base model; the gateway reads its tokenizer, chat template and stop tokens only."""
    served_model_name: str = ""
    """The base model's name in the API; empty: the folder's name. The executors serve the same name."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port; the heartbeat's `url` names it."""
    reuse_port: bool = False
    """Several gateways of one machine may share the port; the kernel spreads connections over them."""
    api_key: str | None = dataclasses.field(default=None, metadata={"secret": True})
    """When set, every route but /health, /live, /ping and /version needs `Authorization: Bearer <key>`."""
    max_n: int = 8
    """Choices that one prompt may ask for."""
    max_tokens_limit: int = 32768
    """The largest `max_tokens` a request may name, whatever the model's context."""
    max_body_bytes: int = 8 * 1024 * 1024
    max_file_bytes: int = 512 * 1024 * 1024
    max_header_bytes: int = 64 * 1024
    """Bytes that are kept of a request whose headers have not ended yet."""
    default_tpot_ms: float | None = None
    """Target for requests that name none; empty: best effort."""
    default_ttft_ms: float | None = None
    request_timeout_s: float = 600.0
    """A request that is not finished by then is cancelled."""
    admission_timeout_s: float = 10.0
    open_wait_s: float = 5.0
    """How long a new request waits for an admission service or an executor that has just died to be replaced."""
    allow_runtime_lora_updating: bool = dataclasses.field(
        default_factory=lambda: os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() in ("1", "true")
    )
    """Whether POST /v1/load_lora_adapter and /v1/unload_lora_adapter exist; vLLM's variable of that name does it too."""
    lora_dir: str | None = None
    """The folder below which /v1/load_lora_adapter may read; empty: nowhere."""
    migration_limit: int = 3
    """How often one request may move to another executor after losing its own."""
    migration_wait_s: float = 60.0
    """How long a started request waits for an executor that can continue it."""
    drain_grace_s: float = 30.0
    """How long streams may run on after SIGTERM."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require((Path(self.model_dir) / "tokenizer.json").is_file(), "model_dir", "name a folder that holds a tokenizer.json")
        require(0 <= self.port < 65536, "port", "be in 0..65535")
        require(1 <= self.max_n <= 128, "max_n", "be in 1..128")
        for name in ("max_tokens_limit", "max_body_bytes", "max_file_bytes", "max_header_bytes", "request_timeout_s"):
            require(getattr(self, name) > 0, name, "be positive")
        for name in (
            "admission_timeout_s",
            "open_wait_s",
            "migration_limit",
            "migration_wait_s",
            "drain_grace_s",
        ):
            require(getattr(self, name) >= 0, name, "not be negative")
        for name in ("default_tpot_ms", "default_ttft_ms"):
            require(getattr(self, name) is None or getattr(self, name) > 0, name, "be positive or empty")

    @property
    def model_name(self) -> str:
        """The base model's name in the API."""
        return self.served_model_name or Path(self.model_dir).resolve().name

    @property
    def default_slo(self) -> Slo:
        """The target of requests that name none."""
        return Slo(tpot_ms=self.default_tpot_ms, ttft_ms=self.default_ttft_ms)
