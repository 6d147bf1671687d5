"""Adapters that are announced to every executor, and the check before that."""

from __future__ import annotations

import msgspec

from common.messages.training import LoraSpec


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True, tag="adapter.1"):
    """A servable adapter: entry of the KV bucket `heddle_adapters`. `artifact` holds adapter_model.safetensors' bytes."""

    name: str
    base_model: str
    artifact: str
    lora: LoraSpec
    created_at: float
    job_id: str = ""


class CheckAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="check_adapter.1"):
    """Could this adapter be served? Asked of any executor of its base model, when its artifact is stored and before its record.

    The answer is AdapterChecked or Rejected with the reason.
    """

    record: AdapterRecord


class AdapterChecked(msgspec.Struct, frozen=True, kw_only=True, tag="adapter_checked.1"):
    """The adapter fits the base model."""

    name: str


# --- finetuning API: anyone -> trainer ---------------------------------------------------------------------------------
