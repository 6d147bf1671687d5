"""Whether two model folders mean the same by their token ids. Knows JSON files, no tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.config import ConfigError
from common.model_folder import read_json_object


def check_same_vocabulary(draft: Path, target: Path) -> None:
    """Raises ConfigError unless a token of one is the same text in the other.

    Where both have a tokenizer.json its tokens are compared, as models of one family may pad their embeddings differently;
    else the vocab_size of their config.json.
    """
    ours, theirs = _tokens(draft), _tokens(target)
    if ours and theirs:
        if ours != theirs:
            odd = min(set(ours.items()) ^ set(theirs.items()), key=lambda item: (item[1], item[0]))
            raise ConfigError(
                f"draft model:{draft} has another vocabulary than {target}: token {odd[1]} is not {odd[0]!r} in both"
            )
        return
    sizes = [read_json_object(folder / "config.json").get("vocab_size") for folder in (draft, target)]
    if sizes[0] != sizes[1] or sizes[0] is None:
        raise ConfigError(f"draft model:{draft} has another vocabulary than {target}: vocab_size {sizes[0]}, not {sizes[1]}")


def _tokens(folder: Path) -> dict[str, int]:
    tokenizer = read_json_object(folder / "tokenizer.json")
    model: Any = tokenizer.get("model")
    vocab: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        vocab = {entry[0]: i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    added: Any = tokenizer.get("added_tokens")
    named = {
        entry["content"]: entry["id"] for entry in added or () if isinstance(entry, dict) and {"content", "id"} <= entry.keys()
    }
    return (vocab if isinstance(vocab, dict) else {}) | named
