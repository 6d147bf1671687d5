"""What the output of a request must be, from the words of OpenAI and vLLM for it. Pure; knows no grammars."""

from __future__ import annotations

from typing import Any

import msgspec

from common.messages import MAX_CONSTRAINT_CHARS, Constraint
from services.gateway.errors import bad_request
from services.gateway.openai_api import GenerateRequest, ResponseFormat, StructuredOutputs


def constraint_of(request: GenerateRequest) -> Constraint | None:
    """None if any text will do. Raises ApiError 400 for one that is incomplete or too long, and for several at once."""
    asked = _asked(request)
    if not asked:
        return None
    if len(asked) > 1:
        raise bad_request(f"Only one constraint is allowed, not {' and '.join(asked)}.", list(asked)[1])
    ((name, constraint),) = asked.items()
    if len(constraint.text) > MAX_CONSTRAINT_CHARS:
        raise bad_request(f"{name} must have at most {MAX_CONSTRAINT_CHARS} characters.", name)
    return constraint


def _asked(request: GenerateRequest) -> dict[str, Constraint]:
    """Every constraint by the name of its field."""
    found: dict[str, Constraint] = {}
    if (constraint := _from_format(request.response_format)) is not None:
        found["response_format"] = constraint
    if request.structured_outputs is not None:
        found |= _from_structured(request.structured_outputs)
    guided = (request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar)
    return found | _from_fields("guided_", *guided)


def _from_structured(outputs: StructuredOutputs) -> dict[str, Constraint]:
    prefix = "structured_outputs."
    found = _from_fields(prefix, outputs.json, outputs.regex, outputs.choice, outputs.grammar)
    if outputs.json_object:
        found[prefix + "json_object"] = Constraint(kind="json_object")
    if not found:
        raise bad_request("Give one of json, regex, choice, grammar and json_object.", "structured_outputs")
    return found


def _from_format(response_format: ResponseFormat | None) -> Constraint | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return Constraint(kind="json_object")
    if response_format.json_schema is None or response_format.json_schema.schema is None:
        raise bad_request("response_format needs json_schema.schema.", "response_format.json_schema")
    return _from_schema("response_format.json_schema", response_format.json_schema.schema)


def _from_fields(
    prefix: str, json: str | dict[str, Any] | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> dict[str, Constraint]:
    found: dict[str, Constraint] = {}
    if json is not None:
        found[prefix + "json"] = _from_schema(prefix + "json", json)
    if regex is not None:
        found[prefix + "regex"] = Constraint(kind="regex", text=regex)
    if choice is not None:
        if not choice:
            raise bad_request(f"{prefix}choice must not be empty.", prefix + "choice")
        found[prefix + "choice"] = Constraint(kind="choice", text=_dump(prefix + "choice", choice))
    if grammar is not None:
        found[prefix + "grammar"] = Constraint(kind="grammar", text=grammar)
    return found


def _from_schema(name: str, schema: str | dict[str, Any]) -> Constraint:
    if isinstance(schema, str):
        try:
            msgspec.json.decode(schema, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError) as error:
            raise bad_request(f"{name} is not a JSON schema: {error}", name) from error
    return Constraint(kind="json_schema", text=schema if isinstance(schema, str) else _dump(name, schema))


def _dump(name: str, value: object) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:  # MessagePack holds what JSON does not
        raise bad_request(f"{name} cannot be written as JSON: {error}", name) from error
