"""A tiny model with a real small tokenizer, and constraints for it. Knows how texts are checked, not how they are made."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema

from common.chat import ChatTokenizer
from common.messages import Constraint, InferenceRequest
from services.executor.engine import Engine
from services.executor.grammar import Grammar, GrammarState, Vocabulary
from services.executor.model import Decoder
from tests.fakes import write_tiny_model
from tests.tiny import ending_at, tiny_engine, tiny_pair

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", None]}, "minItems": 1, "maxItems": 2},
        "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {"leaf": {"type": "object", "properties": {"x": {"enum": [1, 2.5]}}, "additionalProperties": False}},
}
REGEX = r"([0-9]{1,3}\.){3}[0-9]{1,3}( [a-f]+ ?)?"
CHOICES = ["red", "reddish", "green", "a blue one"]
LARK = 'start: pair ("," pair)~0..2\npair: "(" /[0-9]/ pair? ")"'


def _is_valid(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


def _is_nested(text: str) -> bool:
    while (shorter := re.sub(r"\([0-9]x?\)", "x", text)) != text:
        text = shorter
    return re.fullmatch("x(,x){0,2}", text) is not None


CONSTRAINTS: dict[str, tuple[Constraint, Callable[[str], bool]]] = {
    "json_schema": (Constraint(kind="json_schema", text=json.dumps(SCHEMA)), _is_valid),
    "json_object": (Constraint(kind="json_object"), lambda text: isinstance(json.loads(text), dict)),
    "regex": (Constraint(kind="regex", text=REGEX), lambda text: re.fullmatch(REGEX, text) is not None),
    "choice": (Constraint(kind="choice", text=json.dumps(CHOICES)), lambda text: text in CHOICES),
    "grammar": (Constraint(kind="grammar", text=LARK), _is_nested),
}
"""Each kind, and whether a finished text is what it asks for; both raise or say no."""


@functools.cache
def tokenizer() -> ChatTokenizer:
    """Byte-level BPE of about 350 words."""
    with tempfile.TemporaryDirectory() as folder:
        return ChatTokenizer.load(write_tiny_model(Path(folder)))


@functools.cache
def vocabulary() -> Vocabulary:
    """What the executor reads of the same tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder))
        return Vocabulary.load(Path(folder), tokenizer().vocab_size, tokenizer().eos_token_ids)


@functools.cache
def decoder() -> Decoder:
    """A random model of these words that ends at the tokenizer's end token."""
    return ending_at(tiny_pair(vocab_size=tokenizer().vocab_size)[1], *tokenizer().eos_token_ids)


@functools.cache
def grammar(constraint: Constraint) -> Grammar:
    """Compiled for these words."""
    return Grammar(constraint, vocabulary())


def state_of(request: InferenceRequest) -> GrammarState | None:
    """What the executor's actor hands to its engine."""
    if request.constraint is None:
        return None
    generated = request.prompt_tokens[len(request.prompt_tokens) - request.num_generated :]
    return grammar(request.constraint).start(generated, request.stop_token_ids)


def constrained_engine(*requests: InferenceRequest, adapters: dict[str, Any] | None = None, **overrides: Any) -> Engine:
    """An engine that holds these requests; those named like an adapter use it."""
    options: dict[str, Any] = {"num_pages": 4000, "max_sequences": 2000} | overrides
    engine = tiny_engine(decoder(), **options)
    engine.adapters |= adapters or {}
    for request in requests:
        name = request.model if request.model in engine.adapters else None
        assert engine.submit(request, name, grammar=state_of(request)) is None
    return engine


def text_of(tokens: Sequence[int]) -> str:
    """What the gateway shows."""
    return tokenizer().decode(tokens)


def ids(text: str) -> list[int]:
    """The tokens of a text."""
    return tokenizer().encode(text)
