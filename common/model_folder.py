"""What the JSON files of a Hugging Face folder say to every service: settings, end tokens. Knows neither words nor weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.config import ConfigError


class ModelFolderError(ConfigError):
    """A file of the model's folder is missing, damaged or says what cannot be; the message names the file or the field."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file. Raises ModelFolderError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} is not a JSON object")
    return value


def end_token_ids(folder: Path) -> tuple[int, ...]:
    """Every id that a file of the folder calls end of sequence, without repeats: generation_config.json's first, then
    config.json's, then the `eos_token` of tokenizer_config.json if tokenizer.json has an id for it. Raises ModelFolderError.

    All of them count, as chat models often name the end of a turn in one file and the end of a text in another.
    """
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_json_object(folder / name).get("eos_token_id")
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in found):
            raise ModelFolderError(f"eos_token_id: {value!r} in {folder / name} is no token id")
        ids += found
    if (named := _named_end_token(folder)) is not None:
        ids.append(named)
    return tuple(dict.fromkeys(ids))


def token_text(token: Any) -> str:
    """Special tokens in tokenizer_config.json are strings, or objects with the string in `content`."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _named_end_token(folder: Path) -> int | None:
    eos = read_json_object(folder / "tokenizer_config.json").get("eos_token")
    if eos is None:
        return None
    tokenizer = read_json_object(folder / "tokenizer.json")
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and entry.get("content") == token_text(eos) and type(entry.get("id")) is int:
            return int(entry["id"])
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        found = vocab.get(token_text(eos))
        return found if type(found) is int else None
    words = [entry[0] for entry in vocab if isinstance(entry, list) and entry] if isinstance(vocab, list) else []
    return words.index(token_text(eos)) if token_text(eos) in words else None
