"""`heddle adapters`: lists, imports, exports and deletes the adapters of a running system, as PEFT folders. No torch."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from nats.js.errors import KeyNotFoundError, ObjectNotFoundError
from rich.table import Table

from common import subjects
from common.adapters import AdapterRefusedError, UnknownAdapterError, add_adapter, remove_adapter, unknown_adapter
from common.artifacts import read_object
from common.bus import Bus, NoServiceError
from common.codec import MalformedMessageError, decode
from common.messages import AdapterRecord, LoraSpec
from common.peft_folder import CONFIG, WEIGHTS, PeftFolderError, read_peft_folder
from common.records import record_keys
from services.cli.status import wide_console

READ_TIMEOUT_S = 120.0


class AdapterError(ValueError):
    """The adapter does not exist, is damaged, does not fit, or cannot be written there."""


async def list_adapters(bus: Bus) -> list[AdapterRecord]:
    """All servable adapters, oldest first."""
    bucket = await bus.key_value(subjects.ADAPTERS_BUCKET)
    records = []
    for key in await record_keys(bus, subjects.ADAPTERS_BUCKET):
        with contextlib.suppress(KeyNotFoundError):  # deleted since the listing
            records.append(_record((await bucket.get(key)).value or b"", key))
    return sorted(records, key=lambda record: (record.created_at, record.name))


def show_adapters(records: list[AdapterRecord]) -> None:
    """Print a table."""
    table = Table("adapter", "base model", "rank", "alpha", "created", "job", box=None, pad_edge=False, header_style="bold")
    for record in records:
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created_at))
        lora = record.lora
        sizes = (str(lora.rank), f"{lora.alpha:g}") if lora.method == "lora" else (kind_of(lora), "")
        table.add_row(record.name, record.base_model, *sizes, created, record.job_id)
    wide_console().print(table if records else "no adapters yet")


def kind_of(lora: LoraSpec) -> str:
    """What kind of adapter it is, in a few words."""
    return {"ia3": "(IA)3", "bottleneck": f"bottleneck {lora.rank}"}.get(lora.method, f"rank {lora.rank}")


async def export(bus: Bus, name: str, folder: Path) -> AdapterRecord:
    """Write adapter `name` into `folder`, which must be new or empty. Raises AdapterError."""
    records = {record.name: record for record in await list_adapters(bus)}
    if name not in records:
        raise AdapterError(unknown_adapter(name, list(records)))
    write_folder(folder, records[name], await _weights(bus, records[name]))
    return records[name]


async def import_folder(bus: Bus, folder: Path, name: str | None, base_model: str | None) -> AdapterRecord:
    """Serve the PEFT folder as `name` (default: the folder's name). Raises AdapterError.

    It has to be made for a base model that is served; `base_model` says which one that is, if its maker called it otherwise.
    """
    try:
        found = read_peft_folder(folder)
        served = base_model or found.base_model.rstrip("/").rpartition("/")[2]
        if not served:
            raise AdapterError(f"{CONFIG}: base_model_name_or_path is empty; name the base model with --base-model")
        return await add_adapter(bus, name or folder.name, served, found.lora, found.weights)
    except AdapterRefusedError as error:
        hint = "" if base_model else f" ({CONFIG} names {found.base_model}; --base-model names what it is served as)"
        raise AdapterError(f"{error}{hint if 'no executor' in str(error) else ''}") from error
    except (PeftFolderError, OSError) as error:
        raise AdapterError(str(error)) from error


async def delete(bus: Bus, name: str) -> AdapterRecord:
    """Serve the adapter no more, and delete its weights. Raises AdapterError."""
    try:
        return await remove_adapter(bus, name)
    except UnknownAdapterError as error:
        raise AdapterError(str(error.args[0])) from error
    except (AdapterRefusedError, NoServiceError) as error:
        raise AdapterError(str(error)) from error


def write_folder(folder: Path, record: AdapterRecord, weights: bytes) -> None:
    """The PEFT folder of one adapter. Raises AdapterError where there is something else already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise AdapterError(f"{folder} is not empty")
        (folder / WEIGHTS).write_bytes(weights)
        (folder / CONFIG).write_text(json.dumps(peft_config(record), indent=2) + "\n")
        (folder / "README.md").write_text(model_card(record))
    except OSError as error:
        raise AdapterError(f"cannot write to {folder}: {error.strerror}") from error


def peft_config(record: AdapterRecord) -> dict[str, Any]:
    """The adapter's shape in PEFT's words."""
    if record.lora.method == "ia3":
        return {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": record.base_model,
            "target_modules": list(record.lora.target_modules),
            "feedforward_modules": list(record.lora.feedforward_modules),
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_ia3_weights": True,
            "modules_to_save": None,
        }
    if record.lora.method == "bottleneck":
        return _bottleneck_config(record)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": record.base_model,
        "r": record.lora.rank,
        "lora_alpha": record.lora.alpha,
        "lora_dropout": record.lora.dropout,
        "target_modules": list(record.lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": record.lora.use_rslora,
        "use_dora": False,
        "modules_to_save": None,
    }


def _bottleneck_config(record: AdapterRecord) -> dict[str, Any]:
    """PEFT has no such class: the words are those of LLM-Adapters (Hu et al. 2023), whose PEFT has one."""
    return {
        "peft_type": "BOTTLENECK",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": record.base_model,
        "bottleneck_size": record.lora.rank,
        "non_linearity": record.lora.non_linearity,
        "adapter_dropout": record.lora.dropout,
        "scaling": 1.0,
        "target_modules": list(record.lora.target_modules),
        "use_parallel_adapter": False,
        "bias": "none",
        "init_weights": "mam_adapter",
        "inference_mode": True,
        "modules_to_save": None,
    }


def model_card(record: AdapterRecord) -> str:
    """A short model card: what the adapter is and how to load it."""
    lora = record.lora
    kind, sizes = {
        "lora": ("LoRA", f"Rank {lora.rank}, alpha {lora.alpha:g}, on"),
        "ia3": ("(IA)3", "On"),
        "bottleneck": ("A bottleneck adapter", f"Size {lora.rank}, {lora.non_linearity}, behind"),
    }[lora.method]
    library = "heddle" if lora.method == "bottleneck" else "peft"
    header = f"---\nbase_model: {record.base_model}\nlibrary_name: {library}\ntags:\n- {lora.method}\n- heddle\n---\n"
    use = (
        "PEFT has no such class; `heddle adapters import path/to/this/folder` serves it.\n"
        if lora.method == "bottleneck"
        else "```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")\n```\n'
    )
    origin = f", by finetuning job `{record.job_id}`" if record.job_id else ""
    return (
        f"{header}\n# {record.name}\n\n"
        f"{kind} for {record.base_model}, trained token by token while the model served requests (Heddle{origin}).\n\n"
        f"{sizes} {', '.join(lora.target_modules)}.\n\n{use}"
    )


def _record(data: bytes, key: str) -> AdapterRecord:
    try:
        return decode(data, AdapterRecord)
    except MalformedMessageError as error:
        raise AdapterError(f"the record of adapter {key} is damaged: {error}") from error


async def _weights(bus: Bus, record: AdapterRecord) -> bytes:
    store = await bus.object_store(subjects.ARTIFACTS_STORE)
    try:
        return await read_object(store, record.artifact, READ_TIMEOUT_S)
    except ObjectNotFoundError as error:
        raise AdapterError(f"the weights of {record.name} ({record.artifact}) are not in the object store") from error
    except TimeoutError as error:
        raise AdapterError(f"the weights of {record.name} could not be read in {READ_TIMEOUT_S:g} s") from error
