"""What `python -m services.<role> --help` prints: the settings, as their dataclass has them. Knows no service."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

from common.config import ServiceConfig
from common.messages import Role

WIDTH = 110


def usage(role: Role) -> str:
    """One line."""
    return f"usage: python -m services.{role} [--help]"


def settings_help(role: Role, config_type: type[ServiceConfig]) -> str:
    """Variable, type, default and docstring of each field."""
    texts = _docstrings(config_type)
    lines = [
        usage(role),
        "",
        f"Runs until SIGTERM or SIGINT. Settings are environment variables; HEDDLE_<FIELD> holds for all services that have the"
        f" field, HEDDLE_{role.upper()}_<FIELD> for this one and before the other.",
    ]
    parts = ["\n".join(textwrap.fill(line, WIDTH) for line in lines)]
    for field in dataclasses.fields(config_type):
        title = f"HEDDLE_{role.upper()}_{field.name.upper()}  {field.type}, {_default(field)}"
        text = textwrap.fill(
            " ".join(texts.get(field.name, "").split()), WIDTH, initial_indent="    ", subsequent_indent="    "
        )
        parts.append(f"{title}\n{text}" if text else title)
    return "\n\n".join(parts)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"default {field.default if field.default != '' else '(empty)'}"
    return "required" if field.default_factory is dataclasses.MISSING else "default chosen at the start"


def _docstrings(config_type: type[ServiceConfig]) -> dict[str, str]:
    """The string literals under the fields, which Python itself does not keep."""
    found: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for node, following in zip(definition.body, definition.body[1:], strict=False):
            match node, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = text
    return found
