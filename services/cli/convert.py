"""Turns a GGUF file, a Hugging Face folder or a hub name into a folder of bfloat16 safetensors and a tokenizer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernels.cache import cache_dir
from services.cli.models import ModelError, Source, cached_folder, check_folder, is_sound, locate, usable_folder

HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt"]
ORIGIN = "converted_from.txt"


def convert(model: str, out: Path | None = None) -> Path:
    """The folder with the converted model: `out`, or a sound folder that is already there, or a new one in the cache.

    Whole or not at all: the folder is renamed into place when it is complete. Two processes that convert the same model
    do it once. Raises ModelError.
    """
    source = locate(model)
    if source.kind == "hub":
        source = _downloaded(source)
    if out is None and (ready := usable_folder(source, cache_dir())) is not None:
        return ready
    target = out or cached_folder(source, cache_dir())
    with _locked(target):
        if is_sound(target) and _origin(target) == source.name:
            return target
        if out is not None and out.exists() and any(out.iterdir()):
            raise ModelError(f"{out} is not empty and holds {_origin(out) or 'something else'}, not {source.name}")
        _replace(target, source)
    return target


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Holds the target's lock file; the kernel releases it when the process dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _origin(folder: Path) -> str:
    """The source's name that a conversion left in its folder; empty for a folder that is none."""
    try:
        return (folder / ORIGIN).read_text()
    except OSError:
        return ""


def _replace(target: Path, source: Source) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write(source, partial)
        (partial / ORIGIN).write_text(source.name)
        check_folder(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(source: Source, folder: Path) -> None:
    """Load with transformers, write bfloat16. What it raises for a file it cannot read becomes one error."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    place, options = _loading_options(source)
    loader: Any = transformers.AutoModelForCausalLM
    try:
        # Dequantizing in float32 and rounding once is more exact than dequantizing in bfloat16.
        model, info = loader.from_pretrained(place, dtype=torch.float32, output_loading_info=True, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **{k: v for k, v in options.items() if k == "gguf_file"})
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError, ImportError) as error:
        raise ModelError(f"{source.location} cannot be converted: {error}") from error
    if missing := sorted(info["missing_keys"]):  # transformers would make them up
        raise ModelError(f"{source.location} lacks {len(missing)} tensors of a {type(model).__name__}: {missing[0]}")
    if source.kind == "gguf":
        from services.cli.gguf_extras import check_all_read, restore_pre_tokenizer, restore_rope

        check_all_read(model, Path(source.location))
        restore_pre_tokenizer(tokenizer, Path(source.location))
        restore_rope(model.config, Path(source.location))
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _loading_options(source: Source) -> tuple[str, dict[str, Any]]:
    if source.kind != "gguf":
        return source.location, {}
    from transformers import GgufConfig

    path = Path(source.location)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file")
    return str(path.parent), {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}


def _downloaded(source: Source) -> Source:
    """The hub's model as a folder in the hub's own cache. Raises ModelError when it cannot be had."""
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(source.location, allow_patterns=HUB_FILES)
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub does not answer"
        raise ModelError(f"{source.location} is not in the hub's cache on this machine, and {why}") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(f"{source.location} cannot be downloaded from the hub: {error}") from error
    return Source(kind="folder", name=source.name, location=folder)


def main() -> None:
    """`python -m services.cli.convert MODEL [OUT]`: prints the folder; a reason and status 1 when there is none."""
    try:
        print(convert(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None))
    except ModelError as error:
        sys.exit(f"heddle: {' '.join(str(error).split())}")  # `heddle up` shows one line


if __name__ == "__main__":
    main()
